#!/usr/bin/env bash
# The record system on one machine with eight GPUs, from nothing: installs, fetches FineWeb, trains, or goes on with a run
# that was stopped.
#
#   scripts/train_8xh100.sh [RUN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=${1:-logs/recurrent-8xh100}
python -m pip install --quiet -e '.[cuda12,data]'
python scripts/download_fineweb.py 7  # 700M tokens; the run takes 668.47M
if [[ -e $run_dir/config.json ]]; then
  exec python -m senano_jax.train --run-dir "$run_dir" --resume
fi
exec python -m senano_jax.train recurrent --run-dir "$run_dir" --checkpoint-every 100
