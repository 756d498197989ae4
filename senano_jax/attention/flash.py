"""Flash attention over intervals, three Pallas kernels for NVIDIA GPUs.

FlashAttention-2 (arXiv 2307.08691) with one change: query q sees the keys key_start[q] <= k <= q. Both bounds of
`Intervals` are sorted, so the tiles that a query tile meets are a range, and so are those that a key tile meets. Tiles
outside are never visited, in either direction; tiles inside need no mask; only the two borders of the range compare
positions. The bounds are read from memory at run time: one compilation serves every window and every packing.

Names end in their dimensions: Q a tile of queries, K a tile of keys, D the width of a head. Scores are in units of
log2, so that exp and log are the hardware's exp2 and log2: p = exp2(scale * log2(e) * q.k - lse).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from senano_jax.attention import pallas_triton
from senano_jax.attention.intervals import BLOCK, Intervals
from senano_jax.attention.tiles import Tile, Tiles, default_tiles

LOG2_E = math.log2(math.e)
# Finite: a row whose keys are all hidden in its first tile collects garbage of weight exp2(0) there, which
# exp2(MASKED - m) = 0 wipes out when the row meets its own key; -inf would make that inf - inf.
MASKED = -1e30


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
    *,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of each query over its interval of keys; bfloat16, or float32 for tests.

    T must be a multiple of 128, D a power of two from 16 up, scale positive. Out and its log-sum-exp are named
    "attention_out" and "attention_lse" for rematerialisation policies. `interpret` runs the kernels in plain XLA,
    the default where there is no GPU.
    """
    length, width = q.shape[1], q.shape[3]
    if length % BLOCK:
        raise ValueError(f"flash_attention needs a length that is a multiple of {BLOCK}, got {length}")
    if width < 16 or width & (width - 1):
        raise ValueError(f"flash_attention needs heads whose width is a power of two from 16 up, got {width}")
    if not scale > 0:
        raise ValueError(f"flash_attention needs a positive scale, got {scale}")
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    return _attention(q, k, v, intervals, float(scale), tiles or default_tiles(q.dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, intervals, scale, tiles, interpret):
    return forward(q, k, v, intervals, scale, tiles, interpret)[0]


def _attention_fwd(q, k, v, intervals, scale, tiles, interpret):
    out, lse_BHT = forward(q, k, v, intervals, scale, tiles, interpret)
    out = checkpoint_name(out, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return out, (q, k, v, intervals, out, lse_BHT)


def _attention_bwd(scale, tiles, interpret, residuals, dout):
    q, k, v, intervals, out, lse_BHT = residuals
    dq, delta_BHT = backward_queries(q, k, v, out, dout, lse_BHT, intervals.key_start, scale, tiles.dq, interpret)
    dk, dv = backward_keys(q, k, v, dout, lse_BHT, delta_BHT, intervals.query_end, scale, tiles.dkv, interpret)
    return dq, dk, dv, None  # the bounds are integers


_attention.defvjp(_attention_fwd, _attention_bwd)


# --- launches: one program a tile; heads vary fastest, so that neighbours read the same bounds and the same rows ---


def _specs(length: int, heads: int, width: int, rows: int):
    """Block specs of program (head, tile, sequence): its rows or the whole sequence, [T, D] or [T]."""
    return (
        pl.BlockSpec((None, rows, None, width), lambda h, i, b: (b, i, h, 0)),
        pl.BlockSpec((None, length, None, width), lambda h, i, b: (b, 0, h, 0)),
        pl.BlockSpec((None, None, rows), lambda h, i, b: (b, h, i)),
        pl.BlockSpec((None, None, length), lambda h, i, b: (b, h, 0)),
        pl.BlockSpec((None, length), lambda h, i, b: (b, 0)),
    )


def forward(q, k, v, intervals, scale, tiles, interpret):
    batch, length, heads, width = q.shape
    tile = tiles.forward
    tile_QD, all_TD, tile_Q, _, bounds_T = _specs(length, heads, width, tile.queries)
    return pallas_triton.call(
        functools.partial(_forward_kernel, scale=scale, tile=tile),
        name="flash_forward",
        grid=(heads, length // tile.queries, batch),
        in_specs=[tile_QD, all_TD, all_TD, bounds_T],
        out_specs=[tile_QD, tile_Q],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        tile=tile,
        interpret=interpret,
    )(q, k, v, intervals.key_start)


def backward_queries(q, k, v, out, dout, lse_BHT, key_start_BT, scale, tile, interpret):
    batch, length, heads, width = q.shape
    tile_QD, all_TD, tile_Q, _, bounds_T = _specs(length, heads, width, tile.queries)
    return pallas_triton.call(
        functools.partial(_backward_queries_kernel, scale=scale, tile=tile),
        name="flash_backward_queries",
        grid=(heads, length // tile.queries, batch),
        in_specs=[tile_QD, all_TD, all_TD, tile_QD, tile_QD, tile_Q, bounds_T],
        out_specs=[tile_QD, tile_Q],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_BHT.shape, jnp.float32),
        ],
        tile=tile,
        interpret=interpret,
    )(q, k, v, out, dout, lse_BHT, key_start_BT)


def backward_keys(q, k, v, dout, lse_BHT, delta_BHT, query_end_BT, scale, tile, interpret):
    batch, length, heads, width = q.shape
    tile_KD, all_TD, _, all_T, bounds_T = _specs(length, heads, width, tile.keys)
    return pallas_triton.call(
        functools.partial(_backward_keys_kernel, scale=scale, tile=tile),
        name="flash_backward_keys",
        grid=(heads, length // tile.keys, batch),
        in_specs=[all_TD, tile_KD, tile_KD, all_TD, all_T, all_T, bounds_T],
        out_specs=[tile_KD, tile_KD],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        tile=tile,
        interpret=interpret,
    )(q, k, v, dout, lse_BHT, delta_BHT, query_end_BT)


# --- kernels ---


def _forward_kernel(q_ref, k_ref, v_ref, key_start_ref, out_ref, lse_ref, *, scale: float, tile: Tile):
    query0 = pl.program_id(1) * tile.queries
    q_QD = q_ref[...]
    visible, key_tiles = _visible_keys(key_start_ref, query0, tile)

    def step(j, carry, masked):
        out_QD, max_Q, sum_Q = carry
        keys = pl.ds(j * tile.keys, tile.keys)
        score_QK, to_log2 = _dot(q_QD, k_ref[keys, :].T), scale * LOG2_E
        if masked:  # MASKED is already in log2: scaled once for the maximum, once fused below, it would round apart
            score_QK, to_log2 = jnp.where(visible(j), score_QK * to_log2, MASKED), 1.0
        new_max_Q = jnp.maximum(max_Q, jnp.max(score_QK, axis=1) * to_log2)
        p_QK = jnp.exp2(score_QK * to_log2 - new_max_Q[:, None])
        decay_Q = jnp.exp2(max_Q - new_max_Q)
        v_KD = v_ref[keys, :]
        out_QD = out_QD * decay_Q[:, None] + _dot(p_QK.astype(v_KD.dtype), v_KD)
        return out_QD, new_max_Q, sum_Q * decay_Q + jnp.sum(p_QK, axis=1)

    zero_Q = jnp.zeros((tile.queries,), jnp.float32)
    out_QD, max_Q, sum_Q = _sweep(key_tiles, step, (jnp.zeros(q_QD.shape, jnp.float32), zero_Q + MASKED, zero_Q))
    out_ref[...] = (out_QD / sum_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_Q + jnp.log2(sum_Q)


def _backward_queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    dout_ref,
    lse_ref,
    key_start_ref,
    dq_ref,
    delta_ref,
    *,
    scale: float,
    tile: Tile,
):
    """dQ, and delta = rowsum(dout * out) for the other half: here because dout is at hand."""
    query0 = pl.program_id(1) * tile.queries
    q_QD, dout_QD, lse_Q = q_ref[...], dout_ref[...], lse_ref[...]
    delta_Q = jnp.sum(out_ref[...].astype(jnp.float32) * dout_QD.astype(jnp.float32), axis=1)
    delta_ref[...] = delta_Q
    visible, key_tiles = _visible_keys(key_start_ref, query0, tile)

    def step(j, dq_QD, masked):
        keys = pl.ds(j * tile.keys, tile.keys)
        k_KD = k_ref[keys, :]
        p_QK = jnp.exp2(_dot(q_QD, k_KD.T) * (scale * LOG2_E) - lse_Q[:, None])
        if masked:
            p_QK = jnp.where(visible(j), p_QK, 0.0)
        dscore_QK = p_QK * (_dot(dout_QD, v_ref[keys, :].T) - delta_Q[:, None])
        return dq_QD + _dot(dscore_QK.astype(k_KD.dtype), k_KD)

    dq_QD = _sweep(key_tiles, step, jnp.zeros(q_QD.shape, jnp.float32))
    dq_ref[...] = (dq_QD * scale).astype(dq_ref.dtype)


def _backward_keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    query_end_ref,
    dk_ref,
    dv_ref,
    *,
    scale: float,
    tile: Tile,
):
    """dK and dV on transposed tiles: the probabilities come out as the left factor of both products."""
    key0 = pl.program_id(1) * tile.keys
    k_KD, v_KD = k_ref[...], v_ref[...]
    visible, query_tiles = _visible_queries(query_end_ref, key0, tile)

    def step(i, carry, masked):
        dk_KD, dv_KD = carry
        queries = pl.ds(i * tile.queries, tile.queries)
        q_QD, dout_QD = q_ref[queries, :], dout_ref[queries, :]
        p_KQ = jnp.exp2(_dot(k_KD, q_QD.T) * (scale * LOG2_E) - lse_ref[queries][None, :])
        if masked:
            p_KQ = jnp.where(visible(i), p_KQ, 0.0)
        dv_KD = dv_KD + _dot(p_KQ.astype(dout_QD.dtype), dout_QD)
        dscore_KQ = p_KQ * (_dot(v_KD, dout_QD.T) - delta_ref[queries][None, :])
        return dk_KD + _dot(dscore_KQ.astype(q_QD.dtype), q_QD), dv_KD

    zero_KD = jnp.zeros(k_KD.shape, jnp.float32)
    dk_KD, dv_KD = _sweep(query_tiles, step, (zero_KD, zero_KD))
    dk_ref[...] = (dk_KD * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_KD.astype(dv_ref.dtype)


# --- which tiles, and which scores in them ---


def _visible_keys(key_start_ref, query0, tile: Tile):
    """For the queries from query0: the mask of a key tile, and the ranges of key tiles for `_sweep`."""
    query_Q = query0 + jnp.arange(tile.queries, dtype=jnp.int32)
    key_start_Q = key_start_ref[pl.ds(query0, tile.queries)]
    last = query0 + tile.queries - 1

    def visible(j):
        key_K = j * tile.keys + jnp.arange(tile.keys, dtype=jnp.int32)
        return (key_start_Q[:, None] <= key_K[None, :]) & (key_K[None, :] <= query_Q[:, None])

    first = _floor(key_start_ref[query0], tile.keys)
    stop = _ceil(last + 1, tile.keys)
    # Whole tiles: no query of the tile starts after their first key or precedes their last.
    whole_first = jnp.minimum(_ceil(key_start_ref[last], tile.keys), stop)
    whole_stop = jnp.maximum(_floor(query0 + 1, tile.keys), whole_first)
    return visible, (first, whole_first, whole_stop, stop)


def _visible_queries(query_end_ref, key0, tile: Tile):
    """For the keys from key0: the mask of a query tile (transposed), and the ranges of query tiles for `_sweep`."""
    key_K = key0 + jnp.arange(tile.keys, dtype=jnp.int32)
    query_end_K = query_end_ref[pl.ds(key0, tile.keys)]
    last = key0 + tile.keys - 1

    def visible(i):
        query_Q = i * tile.queries + jnp.arange(tile.queries, dtype=jnp.int32)
        return (key_K[:, None] <= query_Q[None, :]) & (query_Q[None, :] < query_end_K[:, None])

    first = _floor(key0, tile.queries)
    stop = _ceil(query_end_ref[last], tile.queries)
    whole_first = jnp.minimum(_ceil(last, tile.queries), stop)
    whole_stop = jnp.maximum(_floor(query_end_ref[key0], tile.queries), whole_first)
    return visible, (first, whole_first, whole_stop, stop)


def _sweep(ranges, step, carry):
    """Masked tiles, whole tiles, masked tiles, in order."""
    first, whole_first, whole_stop, stop = ranges
    masked, whole = functools.partial(step, masked=True), functools.partial(step, masked=False)
    carry = lax.fori_loop(first, whole_first, masked, carry)
    carry = lax.fori_loop(whole_first, whole_stop, whole, carry)
    return lax.fori_loop(whole_stop, stop, masked, carry)


def _floor(n, size: int):
    return lax.div(n, jnp.int32(size))  # n >= 0; `//` would also compile the rules for negative numbers


def _ceil(n, size: int):
    return _floor(n + (size - 1), size)


def _dot(a, b):
    """Product with float32 accumulation; float32 operands stay float32 (no tf32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
