"""What changes over a run, each a pure function of the step; `step` counts from 0 and `steps` is the whole run."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.optim.config import AdamWConfig, MuonAdamConfig

Step = Int[Array, ""] | int


def learning_rate_factor(step: Step, steps: int, config: MuonAdamConfig | AdamWConfig) -> Float[Array, ""]:
    """What all learning rates of the configuration are multiplied by; float32."""
    if isinstance(config, AdamWConfig):
        return warmup_and_cosine(step, steps, config)
    return constant_and_cooldown(step, steps, config)


def warmup_and_cosine(step: Step, steps: int, config: AdamWConfig) -> Float[Array, ""]:
    """(step + 1) / warmup_steps, then half a cosine from 1 to 0 at the end of the run, as in llm.c; float32."""
    rising = (step + 1) / max(config.warmup_steps, 1)
    progress = jnp.clip((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0, 1)
    return jnp.where(step < config.warmup_steps, rising, 0.5 + 0.5 * jnp.cos(jnp.pi * progress))


def constant_and_cooldown(step: Step, steps: int, config: MuonAdamConfig) -> Float[Array, ""]:
    """1 until the cooldown, then linearly down to `final_lr_factor` at the end of the run; float32."""
    left = (1 - step / steps) / max(config.cooldown_fraction, 1e-9)
    return jnp.minimum(1.0, left + (1 - left) * config.final_lr_factor)


def muon_momentum(step: Step, config: MuonAdamConfig) -> Float[Array, ""]:
    """Linear warm-up from `momentum_start` to `momentum_end`; float32."""
    progress = jnp.minimum(step / max(config.momentum_warmup_steps, 1), 1.0)
    return config.momentum_start + progress * (config.momentum_end - config.momentum_start)
