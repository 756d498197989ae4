"""What changes over a run, each a pure function of the step; `step` counts from 0 and `steps` is the whole run."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.attention import BLOCK
from senano_jax.config import OptimizerConfig

Step = Int[Array, ""] | int


def learning_rate_factor(step: Step, steps: int, config: OptimizerConfig) -> Float[Array, ""]:
    """1 until the cooldown, then linearly down to `final_lr_factor` at the end of the run; float32."""
    left = (1 - step / steps) / max(config.cooldown_fraction, 1e-9)
    return jnp.minimum(1.0, left + (1 - left) * config.final_lr_factor)


def muon_momentum(step: Step, config: OptimizerConfig) -> Float[Array, ""]:
    """Linear warm-up from `momentum_start` to `momentum_end`; float32."""
    progress = jnp.minimum(step / max(config.momentum_warmup_steps, 1), 1.0)
    return config.momentum_start + progress * (config.momentum_end - config.momentum_start)


def window_blocks(step: int, steps: int, final_window_tokens: int) -> int:
    """Long attention window in blocks of 128 tokens: one at step 0, linearly up to `final_window_tokens`, rounded up.

    Evaluated on the host in float64, with the PyTorch program's order of operations: the step at which a block is
    added must not depend on rounding.
    """
    tokens = final_window_tokens * (step / steps)
    return max(1, -int(-tokens // BLOCK))
