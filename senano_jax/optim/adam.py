"""Adam whose arithmetic is float32 whatever the type of its state (Kingma & Ba, arXiv 1412.6980).

`optax.scale_by_adam` computes in the parameters' type; for a bfloat16 embedding the moments would then be rounded
between every two operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int


class AdamState(NamedTuple):
    """The averages are in the shapes of the parameters."""

    count: Int[Array, ""]  # steps taken
    mean: optax.Updates  # moving average of the gradients
    square: optax.Updates  # moving average of their squares


def scale_by_float32_adam(
    b1: float, b2: float, eps: float, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), float32; the moments are stored as `dtype`, or in the parameters'
    types."""

    def init(params):
        mean, square = (optax.tree.zeros_like(params, dtype=dtype) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), mean, square)

    def update(gradients, state, params=None):
        del params
        count = state.count + 1
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        mean = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mean, gradients)
        square = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state.square, gradients)
        correction1, correction2 = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(
            lambda m, v: m / correction1 / (jnp.sqrt(v / correction2) + eps),
            mean,
            square,
        )
        stored_mean, stored_square = (
            jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)
            for new, old in ((mean, state.mean), (square, state.square))
        )
        return updates, AdamState(count, stored_mean, stored_square)

    return optax.GradientTransformation(init, update)
