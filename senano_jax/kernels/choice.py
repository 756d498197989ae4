"""Which of two implementations runs: a fused kernel, or the plain operations that XLA compiles."""

from typing import Literal

import jax

Implementation = Literal["auto", "fused", "plain"]


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


def takes_fused(implementation: Implementation, runs_here: bool, fits: bool, sizes: str) -> bool:
    """Whether to run the fused kernel: `auto` takes it wherever this device runs it and the sizes fit.

    Raises ValueError, naming the `sizes`, for `fused` where they do not fit.
    """
    if implementation == "fused" and not fits:
        raise ValueError(f"no fused kernel for {sizes}")
    return implementation == "fused" or (implementation == "auto" and runs_here and fits)
