"""Attention over all pairs of tokens: O(T^2) memory, short, and the reference for every other implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.attention.intervals import Intervals


def dense_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
) -> Float[Array, "B T H D"]:
    """What `attend` gives, from all T^2 scores."""
    position = jnp.arange(q.shape[1])
    visible_BQK = (intervals.key_start[:, :, None] <= position) & (position <= position[:, None])
    scores_BHQK = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores_BHQK = jnp.where(visible_BQK[:, None], scores_BHQK, -jnp.inf)  # every query sees itself: no empty row
    weights_BHQK = jax.nn.softmax(scores_BHQK, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights_BHQK, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
