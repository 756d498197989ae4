"""Which keys a query may see, as one interval per query.

The PyTorch program hands FlexAttention lists of 128-token blocks clipped to a window of W blocks, plus a causal and a
same-document rule inside the blocks. All of that is one interval: query q sees the keys

    key_start[q] <= k <= q,   key_start[q] = max(document_start[q], 128 * (q // 128 - W + 1)).

`key_start` never decreases, so the queries that see key k are an interval too, [k, query_end[k]). Both are plain
integer vectors: the window W can be a traced number, and one compilation serves a whole window schedule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.windows import BLOCK


class Intervals(NamedTuple):
    """The visible region seen from both sides."""

    key_start: Int[Array, "B T"]  # int32, first key that query q sees; the last one is q itself
    query_end: Int[Array, "B T"]  # int32, one past the last query that sees key k; the first one is k itself


def document_start(tokens_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of the first token of each token's document, int32; 0 before the first END_OF_TEXT."""
    position = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(tokens_BT == END_OF_TEXT, position, 0), axis=1)


def window_intervals(document_start_BT: Int[Array, "B T"], window_blocks: Int[Array, ""] | int) -> Intervals:
    """Intervals of a window of `window_blocks` blocks (a traced number is fine); 0 counts as 1, as in PyTorch."""
    length = document_start_BT.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    window_start = BLOCK * (position // BLOCK - jnp.maximum(window_blocks, 1) + 1)
    key_start = jnp.maximum(document_start_BT, window_start).astype(jnp.int32)
    # key_start is sorted, so the queries that see key k are counted by a binary search.
    query_end = jax.vmap(lambda row: jnp.searchsorted(row, position, side="right"))(key_start)
    return Intervals(key_start, query_end.astype(jnp.int32))
