"""Rows of the embedding that take some of the row before (smear gate, modded-nanogpt of 2025-09)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.model.config import GATE_INPUTS


class Smear(nn.Module):
    """row_t <- row_t + weight sigmoid(gate . row_t[:12]) row_(t-1) for t >= 1, before the first norm; row_t at the
    start.

    It looks back over the start of a document too, by one token. Parameters, float32, zero: gate [12, 1] and weight [].
    """

    def setup(self):
        self.gate = self.param("gate", nn.initializers.zeros, (GATE_INPUTS, 1))
        self.weight = self.param("weight", nn.initializers.zeros, ())

    def __call__(self, rows_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Computed in float32 and rounded once, to the type of the rows."""
        rows32 = rows_BTD.astype(jnp.float32)
        share_BT1 = self.weight * jax.nn.sigmoid(rows32[..., :GATE_INPUTS] @ self.gate)
        before = jnp.pad(rows32[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return (rows32 + share_BT1 * before).astype(rows_BTD.dtype)
