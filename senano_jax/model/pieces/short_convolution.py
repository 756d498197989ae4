"""Sublayers that also read the three tokens before: a causal convolution, by channel, of what they read.

Canon layers (Allen-Zhu, Physics of Language Models, part 4.1) have it here, before attention and before the MLP, and
leave the token itself as it is; Primer (So et al., arXiv 2109.08668) has one behind queries, keys and values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

REACH = 3  # tokens back


class Convolution(NamedTuple):
    """Of what one sublayer reads in one application."""

    weights: Float[Array, "3 D"]  # float32, of the token before, of the one before that, ..
    places: Int[Array, "B T"]  # of each token in its document, from 0


def convolved(h_BTD: Float[Array, "B T D"], convolution: Convolution | None) -> Float[Array, "B T D"]:
    """h_t + sum_k weights_k * h_(t-k), k = 1, 2, 3, over tokens of the same document; h itself without a convolution.

    Computed in float32 and rounded once, to h's type, and so are the gradients.
    """
    return h_BTD if convolution is None else _convolved(h_BTD, *convolution)


@jax.custom_vjp
def _convolved(h_BTD, weights_3D, places_BT):
    return _convolved_fwd(h_BTD, weights_3D, places_BT)[0]


def _convolved_fwd(h_BTD, weights_3D, places_BT):
    h_BTD = lax.optimization_barrier(h_BTD)  # or XLA stores what the norm makes in float32, to read and to keep that
    h32 = h_BTD.astype(jnp.float32)
    before = (_before(h32, k, places_BT) for k in range(1, REACH + 1))
    return (h32 + _weighted(weights_3D, before)).astype(h_BTD.dtype), (h_BTD, weights_3D, places_BT)


def _convolved_bwd(residuals, gradient_BTD):
    """Automatic derivatives would keep three float32 arrays of tokens, this keeps h."""
    h_BTD, weights_3D, places_BT = residuals
    h_BTD, places_BT = lax.optimization_barrier((h_BTD, places_BT))  # or XLA sums by what layers share, in more passes
    h32, gradient32 = h_BTD.astype(jnp.float32), gradient_BTD.astype(jnp.float32)
    after = [_after(gradient32, k, places_BT) for k in range(1, REACH + 1)]
    d_h = (gradient32 + _weighted(weights_3D, after)).astype(h_BTD.dtype)
    return d_h, jnp.stack([jnp.sum(h32 * after_BTD, axis=(0, 1)) for after_BTD in after]), None


_convolved.defvjp(_convolved_fwd, _convolved_bwd)


def _weighted(weights_3D, shifted):
    return sum(weights_D * x_BTD for weights_D, x_BTD in zip(weights_3D, shifted, strict=True))


def _before(x_BTD, k: int, places_BT):
    """Of each token that of the k-th one before it, 0 where its document has none."""
    return _within(_shifted(x_BTD, k), k, places_BT)


def _after(x_BTD, k: int, places_BT):
    """The transpose: of each token that of the k-th one after it, 0 where its document has none."""
    return _shifted(_within(x_BTD, k, places_BT), -k)


def _within(x_BTD, k: int, places_BT):
    return jnp.where(places_BT[..., None] >= k, x_BTD, 0.0)


def _shifted(x_BTD, by: int):
    """Towards later tokens, with 0 where nothing comes from."""
    return lax.pad(x_BTD, jnp.zeros((), x_BTD.dtype), ((0, 0, 0), (by, -by, 0), (0, 0, 0)))
