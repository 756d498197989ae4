# The package with CUDA 12 on Python 3.12. The host brings the NVIDIA driver and its container toolkit.
#
#   docker build -t senano_jax .
#   docker run --gpus all --shm-size 8g -v "$PWD/data:/senano_jax/data" -v "$PWD/logs:/senano_jax/logs" senano_jax \
#       python scripts/download_fineweb.py 7
#   docker run --gpus all --shm-size 8g -v "$PWD/data:/senano_jax/data" -v "$PWD/logs:/senano_jax/logs" senano_jax \
#       python -m senano_jax.train recurrent
FROM python:3.12-slim

WORKDIR /senano_jax
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY senano_jax senano_jax
RUN python -m pip install --no-cache-dir -c constraints.txt -e '.[cuda12,data,plot]'
COPY scripts scripts
COPY docs docs

CMD ["python", "-m", "senano_jax.train", "demo"]
