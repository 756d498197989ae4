"""What each token is asked to predict, and how much each of these predictions weighs."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Targets(NamedTuple):
    """K predictions of each token, all from its one row of logits."""

    tokens: Int[Array, "B T K"]
    weights: Float[Array, "B T K"] | None  # None: K is 1, and every token weighs 1


def targets_of(next_BT: Int[Array, "B T"], weights_K: Float[Array, "K"] | None) -> Targets:
    """The next token of each, or with weights the next K."""
    return Targets(next_BT[..., None], None) if weights_K is None else ahead(next_BT, weights_K)


def ahead(next_BT: Int[Array, "B T"], weights_K: Float[Array, "K"]) -> Targets:
    """The tokens 1, 2, .. K after each, weighted by K numbers (multi-token prediction without parameters, as in
    modded-nanogpt).

    What lies beyond the end of a sequence weighs 0; the start of another document hides nothing.
    """
    length, count = next_BT.shape[1], weights_K.shape[0]
    if count > length:
        raise ValueError(f"a sequence of {length} tokens has no token {count} ahead")
    index_TK = jnp.arange(length)[:, None] + jnp.arange(count)
    tokens = jnp.take(next_BT, jnp.minimum(index_TK, length - 1), axis=1)
    weights_TK = jnp.where(index_TK < length, weights_K, 0).astype(jnp.float32)
    return Targets(tokens, jnp.broadcast_to(weights_TK, tokens.shape))
