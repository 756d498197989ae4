"""Keys that tell what stood before their token (modded-nanogpt of 2025-12: partial key offset), so that one layer can
find what followed an earlier occurrence of its token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.model.rotary import resting_dimensions


def offset_keys(k_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Keys, normalised and turned, of which the dimensions that carry no position are those of the token before.

    The first token of the sequence keeps its own. That of a document takes those of the last token of another one: all
    that crosses the border, to this key alone.
    """
    before_BTHK = jnp.concatenate([k_BTHK[:, :1], k_BTHK[:, :-1]], axis=1)
    return jnp.where(resting_dimensions(k_BTHK.shape[-1]), before_BTHK, k_BTHK)
