"""Weight decay that waits for the step to agree (Chen et al., 2025, arXiv 2510.12402: cautious weight decay)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from senano_jax.optim.muon import step_factor


def add_cautious_decay(
    decay: float, learning_rate: Callable[[Array], Array], down_rate: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Adds decay to Muon's steps u, which have not been multiplied by the learning rate r yet:

        u <- u + r factor decay x       where u x >= 0, elsewhere u <- u          (float32; factor: see step_factor)

    So x moves by r^2 factor decay x towards zero, where the step leads there too or is zero: decay falls with the
    square of the schedule.

    Args:
      learning_rate: r as a function of the step; the keyword argument `rate` of `update` multiplies it.
      down_rate: as of `scale_by_muon`.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params, *, rate=None, **_):
        r = learning_rate(state.count) if rate is None else rate * learning_rate(state.count)

        def decayed(path, u, x):
            strength = r * decay * step_factor(path, x.shape, down_rate)
            return u + strength * jnp.where(u * x >= 0, x.astype(jnp.float32), 0)

        updates = jax.tree.map_with_path(decayed, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
