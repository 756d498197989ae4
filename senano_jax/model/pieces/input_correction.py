"""What a tied table lacks: a difference of low rank between a token's embedding and its column of the head."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.model.elementwise import rows_of


class InputCorrection(nn.Module):
    """row_t <- row_t + left[token_t] @ right, before the first norm: `rank` directions in which a token's embedding may
    go its own way while one table is embedding and head. It costs rank (vocab + dim) numbers in place of vocab dim.

    Parameters, float32: input_left [vocab, rank], zero, and input_right [rank, dim], normal with deviation
    1/sqrt(rank), so that a step of Adam moves the sum as far as it moves the table itself. Not from the literature.
    """

    vocab_size: int
    rank: int

    @nn.compact
    def __call__(self, rows_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Sum in float32, rounded once to the type of the rows."""
        dtype = rows_BTD.dtype
        left = self.param("input_left", nn.initializers.zeros, (self.vocab_size, self.rank))
        deviation = self.rank**-0.5
        right = self.param("input_right", nn.initializers.normal(deviation), (self.rank, rows_BTD.shape[-1]))
        own_BTD = jnp.matmul(rows_of(left, tokens_BT, dtype), right.astype(dtype), preferred_element_type=jnp.float32)
        return (rows_BTD.astype(jnp.float32) + own_BTD).astype(dtype)
