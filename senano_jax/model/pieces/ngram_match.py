"""Embeddings of what followed the last occurrence of the same n-gram: what induction heads look up, without attention
(n-gram heads: Akyürek et al., arXiv 2401.12973), here of the most recent occurrence alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from senano_jax.model.elementwise import weighted_sum


class Matches(NamedTuple):
    """Of one order n, int32. Each number of the two is T where there is no such position."""

    continuation: Int[Array, "B T"]  # of t: i + 1, with i < t the last position whose n-gram is that of t
    reader: Int[Array, "B T"]  # of j: the t whose continuation is j, of which there is one at most


class NgramMatch(nn.Module):
    """x0_t <- x0_t + sum_n x0_c(n, t) M_n, with c(n, t) the position after the last earlier occurrence, in the same
    document, of the n tokens that end at t; c <= t. Without one its term is missing.

    Parameters, float32: ngram_<n> [D, D] for each order n, zero. Not normalised anew, so that x0 is itself at the
    start.
    """

    orders: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x0_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"], start_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """`start_BT` is that of each token's document. Sum in float32, rounded once to x0's type."""
        dtype, width = x0_BTD.dtype, x0_BTD.shape[-1]
        terms = []
        for order in self.orders:
            matrix = self.param(f"ngram_{order}", nn.initializers.zeros, (width, width))
            # The product first: of what a row reads, nothing but positions is kept for the backward pass.
            terms.append(continued(x0_BTD @ matrix.astype(dtype), last_matches(tokens_BT, start_BT, order)))
        return weighted_sum((1.0, x0_BTD), *((1.0, term_BTD) for term_BTD in terms), dtype=dtype)


def last_matches(tokens_BT: Int[Array, "B T"], start_BT: Int[Array, "B T"], order: int) -> Matches:
    """Of the n-grams of `order` tokens that lie within one document; `start_BT` is the first position of each token's.

    A stable sort by the tokens of the n-gram puts the last earlier occurrence on the left of each position. Documents
    are no key: where that occurrence begins before the document does, so do all earlier ones.
    """
    length = tokens_BT.shape[1]
    position_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens_BT.shape)
    ngram = [jnp.pad(tokens_BT, ((0, 0), (back, 0)))[:, :length] for back in range(order)]
    *ngram, position_BT, start_BT = lax.sort(
        (*ngram, position_BT, start_BT), dimension=1, num_keys=order, is_stable=True
    )
    earlier, later = position_BT[:, :-1], position_BT[:, 1:]
    matches = earlier - (order - 1) >= start_BT[:, 1:]
    for token_BT in ngram:
        matches &= token_BT[:, :-1] == token_BT[:, 1:]
    none_B1 = jnp.full((len(tokens_BT), 1), length, jnp.int32)
    continuation_BT = jnp.concatenate([none_B1, jnp.where(matches, earlier + 1, length)], axis=1)
    next_BT = jnp.concatenate([jnp.where(matches, later, length), none_B1], axis=1)
    _, continuation_BT, next_BT = lax.sort((position_BT, continuation_BT, next_BT), dimension=1, num_keys=1)
    return Matches(continuation_BT, jnp.concatenate([none_B1, next_BT[:, :-1]], axis=1))


@jax.custom_vjp
def continued(rows_BTD: Float[Array, "B T D"], matches: Matches) -> Float[Array, "B T D"]:
    """Of each position the row of its continuation; zeros where there is none.

    No row is read twice, so the gradient is such a reading too, in place of a sum over positions that XLA would add up
    slowly and, on GPUs, in any order.
    """
    return _rows_at(rows_BTD, matches.continuation)


def _continued_forward(rows_BTD, matches):
    return continued(rows_BTD, matches), matches.reader


def _continued_backward(reader_BT, gradient_BTD):
    return _rows_at(gradient_BTD, reader_BT), None


continued.defvjp(_continued_forward, _continued_backward)


def _rows_at(rows_BTD, position_BT):
    return jax.vmap(lambda rows_TD, position_T: rows_TD.at[position_T].get(mode="fill", fill_value=0))(
        rows_BTD, position_BT
    )
