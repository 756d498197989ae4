"""A gate on what each attention head gives (modded-nanogpt's sparse attention gate; Qiu et al., arXiv 2505.06708)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.model.config import GATE_INPUTS


class HeadGate(nn.Module):
    """y_h <- sigmoid(gate_h . x[:12]) y_h, for the layer's normalised input x; 1/2 at the start.

    Parameter: gate [visits, H, 12], float32, zero.
    """

    visits: int
    heads: int

    def setup(self):
        self.gate = self.param("gate", nn.initializers.zeros, (self.visits, self.heads, GATE_INPUTS))

    def shares(self, x_BTD: Float[Array, "B T D"], visit: Int[Array, ""] | int) -> Float[Array, "B T H"]:
        """What passes the gate of each head, float32."""
        return jax.nn.sigmoid(x_BTD[..., :GATE_INPUTS].astype(jnp.float32) @ self.gate[visit].T)

    def after(
        self,
        y_BTHK: Float[Array, "B T H K"],
        v_BTHK: Float[Array, "B T H K"],
        x_BTD: Float[Array, "B T D"],
        visit: Int[Array, ""] | int,
    ) -> Float[Array, "B T H K"]:
        """Computed in float32 and rounded once, to y's type."""
        return (y_BTHK * self.shares(x_BTD, visit)[..., None]).astype(y_BTHK.dtype)
