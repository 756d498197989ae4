"""Attention whose heads forget: each token says how much each head keeps of all that came before it (Forgetting
Transformer, Lin et al., arXiv 2503.02130).

What query i sees of key j is multiplied by the shares kept at j + 1 to i, so its logit has the sum of their logarithms.
That is the sum from the document's start to i less the one to j, and softmax does not see the first, which is the same
for all keys. So each key has a number of its own, and attention needs no kernel for it: the number takes the place of
the last two dimensions of the key, which carry no position, and the query has ones there. One dimension holds it as
rounded to the key's type, the other what rounding left.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from senano_jax.attention import BLOCK
from senano_jax.model.config import GATE_INPUTS

BIAS = 5.0  # at the start: a head keeps half after 100 tokens


class ForgetGate(nn.Module):
    """Token t keeps sigmoid(gate_h . x_t[:12] + bias_h) of what came before it, for the layer's normalised input x.

    Parameters, float32: gate [visits, H, 12], zero, and bias [visits, H], 5.
    """

    visits: int
    heads: int

    def setup(self):
        self.gate = self.param("gate", nn.initializers.zeros, (self.visits, self.heads, GATE_INPUTS))
        self.bias = self.param("bias", nn.initializers.constant(BIAS), (self.visits, self.heads))

    def __call__(
        self,
        q_BTHK: Float[Array, "B T H K"],
        k_BTHK: Float[Array, "B T H K"],
        x_BTD: Float[Array, "B T D"],
        places_BT: Int[Array, "B T"],
        visit: Int[Array, ""] | int,
        scale: float,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
        """Queries and keys with the logits' addends in their last two dimensions, for attention that multiplies their
        products by `scale`. `places_BT` is that of each token in its document, from 0."""
        opening_BTH = x_BTD[..., :GATE_INPUTS].astype(jnp.float32) @ self.gate[visit].T + self.bias[visit]
        kept_BTH = sums_in_documents(jax.nn.log_sigmoid(opening_BTH), places_BT)
        return with_addends(q_BTHK, k_BTHK, kept_BTH / -scale)


def sums_in_documents(x_BTH: Float[Array, "B T H"], places_BT: Int[Array, "B T"]) -> Float[Array, "B T H"]:
    """y_t = x_(s+1) + .. + x_t for a document that starts at s; 0 at s. What belongs to other documents is left out,
    not subtracted again, in the gradient too.

    A token adds up what its own block has of its document, and of the blocks before it, where its document reaches
    their end, what their last tokens found.
    """
    (B, T, H), block = x_BTH.shape, jnp.arange(BLOCK)
    x_BHNK = jnp.pad(jnp.swapaxes(x_BTH, 1, 2), ((0, 0), (0, 0), (0, -T % BLOCK))).reshape(B, H, -1, BLOCK)
    start_BT = jnp.arange(T) - places_BT
    start_BNQ = jnp.pad(start_BT, ((0, 0), (0, -T % BLOCK)), mode="edge").reshape(B, -1, BLOCK)
    first_N = BLOCK * jnp.arange(start_BNQ.shape[1])
    after_start_BNQK = start_BNQ[..., None] < first_N[:, None, None] + block
    own_BHNQ = _sum_where(after_start_BNQK & (block <= block[:, None]), x_BHNK[:, :, :, None])
    reached_BNQM = start_BNQ[..., None] < first_N + BLOCK
    before_BNQM = reached_BNQM & (first_N < first_N[:, None])[:, None]
    earlier_BHNQ = _sum_where(before_BNQM, own_BHNQ[:, :, None, None, :, -1])
    return jnp.swapaxes((own_BHNQ + earlier_BHNQ).reshape(B, H, -1), 1, 2)[:, :T]


def _sum_where(chosen: Bool[Array, "B N Q S"], x: Float[Array, "B H #N #Q S"]) -> Float[Array, "B H N Q"]:
    return jnp.where(chosen[:, None], x, 0.0).sum(-1)  # one pass for XLA, which stores no product


def with_addends(
    q_BTHK: Float[Array, "B T H K"], k_BTHK: Float[Array, "B T H K"], addend_BTH: Float[Array, "B T H"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """q and k whose product has `addend` of the key in place of the product of the last two dimensions, to 16 bits of
    it if these are bfloat16. The gradient of the addend is that of its rounded part."""
    rounded_BTH = addend_BTH.astype(k_BTHK.dtype)
    left_BTH = lax.stop_gradient(addend_BTH - rounded_BTH.astype(addend_BTH.dtype)).astype(k_BTHK.dtype)
    last = (0, 0, 0, k_BTHK.shape[-1] - 2)
    q_BTHK = lax.dynamic_update_slice(q_BTHK, jnp.ones_like(q_BTHK[..., -2:]), last)
    return q_BTHK, lax.dynamic_update_slice(k_BTHK, jnp.stack([rounded_BTH, left_BTH], axis=-1), last)
