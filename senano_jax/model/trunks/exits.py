"""A sum of earlier residual streams whose weights each token computes (MUDD: Xiao et al., arXiv 2502.12170, in the form
that modded-nanogpt has of it since 2026-04)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.model.elementwise import weighted_sum

HIDDEN = 64
SCALE = 0.1  # of all weights, so that they move slowly


class Exits(nn.Module):
    """x <- x + sum_i mu_i source_i with mu = 0.1 (gelu(x inner) outer + offset), for each token.

    x is not normalised before. Parameters, float32: inner [D, 64], outer [64, n], zero, and offset [n].
    """

    offsets: tuple[float, ...]
    """What mu is at the start, one a source."""

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], sources: list[Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        """In float32, not rounded. With fewer visits of the loop the last of `sources` are missing."""
        bound = x_BTD.shape[-1] ** -0.5
        inner_DH = self.param("inner", _uniform(bound), (x_BTD.shape[-1], HIDDEN))
        outer_HS = self.param("outer", nn.initializers.zeros, (HIDDEN, len(self.offsets)))
        offset_S = self.param("offset", lambda key: jnp.array(self.offsets, jnp.float32) / SCALE)
        hidden_BTH = jax.nn.gelu(x_BTD @ inner_DH.astype(x_BTD.dtype), approximate=False)
        mu_BTS = SCALE * ((hidden_BTH @ outer_HS.astype(x_BTD.dtype)).astype(jnp.float32) + offset_S)
        terms = [(mu_BTS[..., i, None], source_BTD) for i, source_BTD in enumerate(sources)]
        return weighted_sum((jnp.float32(1), x_BTD), *terms, dtype=jnp.float32)


def _uniform(bound: float):
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
