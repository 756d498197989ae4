"""Rotary position embedding on half of each head's pairs (Su et al., arXiv 2104.09864; half-truncated as in
modded-nanogpt): the other half of the pairs turn at frequency 0, so they carry no position."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def rotary_tables(length: int, head_dim: int) -> tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]:
    """Cosines and sines of position x frequency, float32; half = head_dim / 2 pairs of dimensions (j, half + j).

    Frequencies fall geometrically from 1 to 1/1024 over the first head_dim / 4 pairs and are 0 for the rest.
    """
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * _frequencies(head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def resting_dimensions(head_dim: int) -> Bool[np.ndarray, "D"]:
    """Which dimensions of a head carry no position: those of pairs whose frequency is 0."""
    return np.tile(_frequencies(head_dim) == 0, 2)


def turning_pairs(head_dim: int) -> int:
    """How many pairs, the first ones, have a frequency above 0."""
    return head_dim // 4


def _frequencies(head_dim: int) -> Float[np.ndarray, "half"]:
    turning = (1 / 1024) ** np.linspace(0, 1, turning_pairs(head_dim), dtype=np.float32)
    return np.concatenate([turning, np.zeros(head_dim // 2 - len(turning))]).astype(np.float32)


def rotate(x: Float[Array, "B T H D"], tables: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]):
    """Turns the pairs (x[j], x[half + j]) by their angles, in float32; the result has x's type."""
    cos, sin = tables
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)
