"""Attention from which a second one is taken, with queries of its own over the same keys and values (differential
attention, arXiv 2410.05258, with a share by token and head in place of a norm, as in its second version)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.model.config import GATE_INPUTS
from senano_jax.model.initializers import uniform_fan_in


class Difference(nn.Module):
    """y_h <- y_h - sigmoid(gate_h . x[:12]) z_h, for the layer's normalised input x and what attention gives with the
    second queries, z; half of it at the start.

    Parameters: queries [H, D, K], as `uniform_fan_in` draws them, and gate [visits, H, 12], zero, both float32.
    """

    visits: int
    heads: int
    dim: int

    def setup(self):
        self.queries = self.param("queries", uniform_fan_in, (self.heads, self.dim, self.dim // self.heads))
        self.gate = self.param("gate", nn.initializers.zeros, (self.visits, self.heads, GATE_INPUTS))

    def shares(self, x_BTD: Float[Array, "B T D"], visit: Int[Array, ""] | int) -> Float[Array, "B T H"]:
        """How much of the second attention each head takes off, float32."""
        return jax.nn.sigmoid(x_BTD[..., :GATE_INPUTS].astype(jnp.float32) @ self.gate[visit].T)

    def columns(self, qkv_3DD: Float[Array, "3 D D"]) -> Float[Array, "D 6*D"]:
        """First and second queries, keys and values, as columns of twice as many heads: keys and values stand there
        twice, for the first and for the second queries."""
        q_DD, k_DD, v_DD = qkv_3DD
        second_DD = jnp.swapaxes(self.queries, 0, 1).reshape(q_DD.shape).astype(q_DD.dtype)
        return jnp.concatenate([q_DD, second_DD, k_DD, k_DD, v_DD, v_DD], axis=1)

    def of_both(
        self, both_BTGK: Float[Array, "B T 2*H K"], x_BTD: Float[Array, "B T D"], visit: Int[Array, ""] | int
    ) -> Float[Array, "B T H K"]:
        """Of the heads with the first queries and, behind them, those with the second ones. Computed in float32 and
        rounded once, to their type."""
        y_BTHK, z_BTHK = both_BTGK[:, :, : self.heads], both_BTGK[:, :, self.heads :]
        return (y_BTHK - self.shares(x_BTD, visit)[..., None] * z_BTHK).astype(both_BTGK.dtype)
