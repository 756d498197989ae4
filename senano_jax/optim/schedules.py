"""What changes over a run, each a pure function of the step; `step` counts from 0 and `steps` is the whole run."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.optim.config import Cooldown, Ramp, WarmupCosine

Step = Int[Array, ""] | int


def learning_rate_factor(step: Step, steps: int, schedule: Cooldown | WarmupCosine) -> Float[Array, ""]:
    """What all learning rates of a recipe are multiplied by; float32."""
    if isinstance(schedule, WarmupCosine):
        return warmup_and_cosine(step, steps, schedule)
    return constant_and_cooldown(step, steps, schedule)


def warmup_and_cosine(step: Step, steps: int, schedule: WarmupCosine) -> Float[Array, ""]:
    """(step + 1) / warmup_steps, then half a cosine from 1 to 0 at the end of the run, as in llm.c; float32."""
    rising = (step + 1) / max(schedule.warmup_steps, 1)
    progress = jnp.clip((step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1), 0, 1)
    return jnp.where(step < schedule.warmup_steps, rising, 0.5 + 0.5 * jnp.cos(jnp.pi * progress))


def constant_and_cooldown(step: Step, steps: int, schedule: Cooldown) -> Float[Array, ""]:
    """1 until the cooldown, then linearly down to `floor` at the end of the run; float32."""
    if schedule.fraction == 0:
        return jnp.ones(jnp.shape(step), jnp.float32)
    left = (1 - step / steps) / schedule.fraction
    return jnp.minimum(1.0, left + (1 - left) * schedule.floor)


def ramp(step: Step, values: Ramp) -> Float[Array, ""]:
    """Linear from `start` to `end` over the warm-up, then `end`; float32."""
    progress = jnp.minimum(step / max(values.warmup_steps, 1), 1.0)
    return values.start + progress * (values.end - values.start)
