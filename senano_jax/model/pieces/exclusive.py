"""Attention that leaves out what a token's own value already says (exclusive self-attention, gated as in modded-nanogpt
of 2026-05)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

SMALLEST = 1e-8  # squared length of a value that is divided by


class Exclusive(nn.Module):
    """y_h <- y_h - tanh(strength_h) (y_h . v_h) / |v_h|^2 v_h, with v_h the token's own value; y_h at the start.

    Parameter: strength [visits, H], float32, zero.
    """

    visits: int
    heads: int

    def setup(self):
        self.strength = self.param("strength", nn.initializers.zeros, (self.visits, self.heads))

    def shares(self, visit: Int[Array, ""] | int) -> Float[Array, "H"]:
        """What the heads leave out at a visit."""
        return jnp.tanh(self.strength[visit])

    def after(
        self,
        y_BTHK: Float[Array, "B T H K"],
        v_BTHK: Float[Array, "B T H K"],
        x_BTD: Float[Array, "B T D"],
        visit: Int[Array, ""] | int,
    ) -> Float[Array, "B T H K"]:
        """Computed in float32 and rounded once, to y's type; squared lengths below 1e-8 count as that."""
        return without_own_value(y_BTHK, v_BTHK, self.shares(visit)).astype(y_BTHK.dtype)


def without_own_value(
    y_BTHK: Float[Array, "B T H K"], v_BTHK: Float[Array, "B T H K"], share_H: Float[Array, "H"]
) -> Float[Array, "B T H K"]:
    """y - share (y . v) / |v|^2 v, float32."""
    y32, v32 = y_BTHK.astype(jnp.float32), v_BTHK.astype(jnp.float32)
    along_BTH = (y32 * v32).sum(-1) / jnp.maximum((v32 * v32).sum(-1), SMALLEST)
    return y32 - (share_H * along_BTH)[..., None] * v32
