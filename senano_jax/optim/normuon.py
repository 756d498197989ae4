"""NorMuon: an orthogonal step whose neurons move about equally far (Li et al., 2025, arXiv 2510.05491)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.optim.stacks import Stack, StackRule

_LEAST = 1e-10


def normalized(rule: StackRule, b2: float) -> StackRule:
    """What `rule` makes of a stack, O [n, rows, cols] with rows <= cols, its columns divided by the root of a moving
    average of their mean squares, with the norm of each matrix kept:

        q <- b2 q + (1 - b2) mean(O^2, rows)          (float32 [n, cols], from 0, not bias-corrected)
        U  = O / sqrt(q)
        O <- U ||O|| / ||U||

    A column of a wide matrix is a neuron of its longer side. Of matrices [in, out], these are the hidden units in both
    projections of an MLP, the outputs of a square matrix, and the inputs of two heads' queries or keys.
    """

    def init(stack):
        n, _, cols = stack.shape
        return rule.init(stack), jnp.zeros((n, cols), jnp.float32)

    def update(stack: Stack, kept: tuple[Any, Float[Array, "n cols"]]):
        before, average = kept
        stack, before = rule.update(stack, before)
        x = stack.astype(jnp.float32)
        square = jnp.mean(x * x, axis=-2)
        average = average + (1 - b2) * (square - average)
        scale = 1 / jnp.sqrt(jnp.maximum(average, _LEAST))
        norm, new_norm = (jnp.sqrt(jnp.sum(s, axis=-1, keepdims=True)) for s in (square, square * scale * scale))
        scale = scale * norm / jnp.maximum(new_norm, _LEAST)
        return (x * scale[:, None, :]).astype(stack.dtype), (before, average)

    return StackRule(init, update)
