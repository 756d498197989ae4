"""Queries and keys of fewer dimensions than a head has: what they save pays for layers (modded-nanogpt, pull request
349, has 64 of 128).

Attention runs as it does, with heads in which the other dimensions are 0. Those that stay are equally spaced, so that
as large a part of them carries position, with frequencies over the same range.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(matrices: Float[Array, "*n D H*E"], width: int, head_dim: int) -> Float[Array, "*n D H*K"]:
    """Matrices of queries or keys, each head of `width` columns E, with columns of zeros between them, so that a head
    has `head_dim` of them, K."""
    *n, D, columns = matrices.shape
    spaced = matrices[..., None]
    spaced = jnp.pad(spaced, [(0, 0)] * (spaced.ndim - 1) + [(0, head_dim // width - 1)])
    return spaced.reshape(*n, D, columns // width * head_dim)
