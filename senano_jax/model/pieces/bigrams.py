"""A table of pairs of tokens: what the last two are together, beside what each is by itself."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.model.elementwise import rows_of, weighted_sum

SIGN_ROWS = 8192


class Bigrams(nn.Module):
    """row_t <- row_t + (0, signs_t * table[hash(token_t, token_t-1)]), before the first norm.

    modded-nanogpt has this table since 2026-01 and the signs since 2026-05: pairs that share a row mostly differ in the
    signs of its numbers, which are fixed. It adds rows to the stream in every layer; here they are part of the
    embedding, which every layer reads. They are added to the last dimensions: narrow rows are zero there. The first
    token of a document, and of a sequence, have the last row, which is no pair's, and no token before them; in
    modded-nanogpt only the first one of a sequence, which counts as the number of that row for the token after it.

    Parameters, float32: bigram_table [rows, width], zero.
    """

    rows: int
    width: int

    @nn.compact
    def __call__(self, rows_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Sum in float32, rounded once to the type of the rows."""
        dtype = rows_BTD.dtype
        table = self.param("bigram_table", nn.initializers.zeros, (self.rows, self.width))
        pairs_BTW = rows_of(table, row_numbers(tokens_BT, self.rows), dtype) * signs_of(tokens_BT, self.width)
        before = rows_BTD.shape[-1] - self.width
        added_BTD = jnp.pad(pairs_BTW, ((0, 0), (0, 0), (before, 0)))
        return weighted_sum((1.0, rows_BTD), (1.0, added_BTD), dtype=dtype)


def row_numbers(tokens_BT: Int[Array, "B T"], rows: int) -> Int[Array, "B T"]:
    """The table's row of each token and the one before it."""
    hashed = (36313 * tokens_BT) ^ (27191 * _before(tokens_BT))
    return jnp.where(_is_first(tokens_BT), rows - 1, hashed % (rows - 1))


def sign_numbers(tokens_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The row of signs of each token and the one before it: the same for a b and b a, and for a a and b b."""
    return (tokens_BT ^ _before(tokens_BT)) % SIGN_ROWS


def signs_of(tokens_BT: Int[Array, "B T"], width: int) -> Int[Array, "B T W"]:
    """1 or -1, by both tokens and by dimension."""
    bytes_BTN = jnp.asarray(sign_bits(width))[sign_numbers(tokens_BT)]
    bits_BTN8 = (bytes_BTN[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    bits_BTW = bits_BTN8.reshape(*tokens_BT.shape, -1)[..., :width]
    return 1 - 2 * bits_BTW.astype(jnp.int8)


def _before(tokens_BT):
    return jnp.where(_is_first(tokens_BT), 0, jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0))))


def _is_first(tokens_BT):
    return (tokens_BT == END_OF_TEXT) | (jnp.arange(tokens_BT.shape[1]) == 0)


@functools.cache
def sign_bits(width: int) -> np.ndarray:
    """Random bits, eight a byte: an eighth of what signs would take in the program.

    A trained table means something with its own signs alone, and no checkpoint holds them. So they must never change;
    NumPy has frozen this generator.
    """
    return np.random.RandomState(0).randint(0, 256, (SIGN_ROWS, -(-width // 8)), dtype=np.uint8)
