"""Two heads that attend as one, over a sequence of twice the length (paired heads, after modded-nanogpt of 2026-01).

Token t takes the slots 2t and 2t + 1: heads 0 .. H/2 - 1 are in the first, heads H/2 .. H - 1 in the second. Head h and
head h + H/2 then share a sequence of 2T slots, in which each sees the keys of both. Everything else is attention as it
is, on slots: causal, inside the document, over a window of as many slots as there are tokens in that of other layers,
with rotary positions that number the slots. All changes of shape are free but the order of the weights' columns.

modded-nanogpt puts heads into slots in this way too, but turns even heads by position 2t and odd ones by 2t + 1,
whichever slot they are in.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.attention import window_intervals
from senano_jax.model.context import Slots
from senano_jax.model.rotary import rotary_tables


def slots_of(starts_BT: Int[Array, "B T"], window_blocks: Int[Array, ""] | int, head_dim: int) -> Slots:
    """What attention over slots takes, for documents that begin at the tokens `starts`."""
    starts_BS = jnp.repeat(2 * starts_BT, 2, axis=1)
    windows = {
        is_long: window_intervals(starts_BS, window_blocks // (1 if is_long else 2)) for is_long in (True, False)
    }
    return Slots(rotary_tables(starts_BS.shape[1], head_dim), windows)


def columns_by_slot(qkv_3DD: Float[Array, "3 D D"]) -> Float[Array, "D 3*D"]:
    """Weights of one product whose columns are queries, keys and values of the first slot, then those of the second."""
    D = qkv_3DD.shape[1]
    return qkv_3DD.reshape(3, D, 2, D // 2).transpose(1, 2, 0, 3).reshape(D, 3 * D)


def in_slots(x: Float[Array, "B T H *K"]) -> Float[Array, "B 2*T H/2 *K"]:
    """A row for each slot: the first half of the token's, or the second one."""
    B, T, H, *K = x.shape
    return x.reshape(B, 2 * T, H // 2, *K)
