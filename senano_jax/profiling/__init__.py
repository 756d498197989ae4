"""What `python -m senano_jax.profile` measures: compilation, arithmetic, memory, step times and kernels."""
