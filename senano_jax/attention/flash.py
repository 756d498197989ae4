"""Flash attention over intervals, three Pallas kernels for NVIDIA GPUs.

FlashAttention-2 (arXiv 2307.08691) with one change: query q sees the keys key_start[q] <= k <= q. Both bounds of
`Intervals` are sorted, so the tiles that a query tile meets are a range, and so are those that a key tile meets: tiles
without a visible pair are never visited, in either direction. The bounds are read from memory at run time: one
compilation serves every window and every packing of documents.

Every visited tile is masked. A loop of their own for the tiles that need no mask gained nothing (H200): a mask is one
comparison, while three loops hold more registers than one and drain the pipeline of loads three times. Nor did running
the longest tiles first: the sort cost what the shorter tail saved.

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

from senano_jax.attention.intervals import BLOCK, Intervals
from senano_jax.attention.tiles import Tile, Tiles, default_tiles
from senano_jax.kernels import triton

LOG2_E = math.log2(math.e)
# The running maximum starts above scale * MASKED, so that a hidden score weighs exp2(scale * MASKED - LOWEST) = 0 even
# in a tile where a row sees no key; both are finite, because inf - inf is not a number.
MASKED = -3e38
LOWEST = -1e30


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
    with_values: bool = False,
    *,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """Softmax attention of each query over its interval of keys; bfloat16, or float32 for tests.

    T must be a multiple of 128, D a power of two from 16 up, scale positive. Out and its log-sum-exp are named
    "attention_out" and "attention_lse" for rematerialisation policies. `interpret` runs the kernels in plain XLA,
    the default where there is no GPU.
    """
    length, width = q.shape[1], q.shape[3]
    if length % BLOCK:
        raise ValueError(f"flash_attention needs a length that is a multiple of {BLOCK}, got {length}")
    if not triton.fits(width):
        raise ValueError(f"flash_attention needs heads whose width is a power of two from 16 up, got {width}")
    if not scale > 0:
        raise ValueError(f"flash_attention needs a positive scale, got {scale}")
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    return _attention(q, k, v, intervals, float(scale), with_values, tiles or default_tiles(q.dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attention(q, k, v, intervals, scale, with_values, tiles, interpret):
    out, _ = forward(q, k, v, intervals.key_start, scale, tiles.forward, interpret)
    return (out, v) if with_values else out


def _attention_fwd(q, k, v, intervals, scale, with_values, tiles, interpret):
    out, lse_BHT = forward(q, k, v, intervals.key_start, scale, tiles.forward, interpret)
    out = checkpoint_name(out, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return (out, v) if with_values else out, (q, k, v, intervals, out, lse_BHT)


def _attention_bwd(scale, with_values, tiles, interpret, residuals, gradients):
    q, k, v, intervals, out, lse_BHT = residuals
    dout, other_dv = gradients if with_values else (gradients, None)
    dq, delta_BHT = backward_queries(q, k, v, out, dout, lse_BHT, intervals.key_start, scale, tiles.dq, interpret)
    dk, dv = backward_keys(
        q, k, v, dout, lse_BHT, delta_BHT, intervals.query_end, scale, tiles.dkv, interpret, other_dv
    )
    return dq, dk, dv, None  # the bounds are integers


_attention.defvjp(_attention_fwd, _attention_bwd)


# --- launches: one program a tile, sequence and head; the heads of a tile run side by side and share its bounds ---


@functools.partial(jax.jit, static_argnames=("scale", "tile", "interpret"))  # lowered once for all layers
def forward(q, k, v, key_start_BT, scale: float, tile: Tile, interpret: bool):
    """out, like q, and the log-sum-exp of its scores, float32 [B, H, T] in units of log2."""
    tile_QD, all_TD, tile_Q, _, bounds_T = _block_specs(q, tile.queries)
    return triton.call(
        functools.partial(_forward_kernel, scale=scale, tile=tile, exp2=triton.scaled_exp2(interpret)),
        name="flash_forward",
        grid=_grid(q, tile.queries),
        in_specs=[tile_QD, all_TD, all_TD, bounds_T],
        out_specs=[tile_QD, tile_Q],
        out_shape=[_like(q), _per_query(q)],
        launch=tile,
        interpret=interpret,
    )(q, k, v, key_start_BT)


@functools.partial(jax.jit, static_argnames=("scale", "tile", "interpret"))  # lowered once for all layers
def backward_queries(q, k, v, out, dout, lse_BHT, key_start_BT, scale: float, tile: Tile, interpret: bool):
    """dQ, and delta = rowsum(dout * out), float32 [B, H, T], for `backward_keys`: here because dout is at hand."""
    tile_QD, all_TD, tile_Q, _, bounds_T = _block_specs(q, tile.queries)
    return triton.call(
        functools.partial(_queries_kernel, scale=scale, tile=tile, exp2=triton.scaled_exp2(interpret)),
        name="flash_backward_queries",
        grid=_grid(q, tile.queries),
        in_specs=[tile_QD, all_TD, all_TD, tile_QD, tile_QD, tile_Q, bounds_T],
        out_specs=[tile_QD, tile_Q],
        out_shape=[_like(q), _per_query(q)],
        launch=tile,
        interpret=interpret,
    )(q, k, v, out, dout, lse_BHT, key_start_BT)


@functools.partial(jax.jit, static_argnames=("scale", "tile", "interpret"))  # lowered once for all layers
def backward_keys(
    q, k, v, dout, lse_BHT, delta_BHT, query_end_BT, scale: float, tile: Tile, interpret: bool, other_dv=None
):
    """dK and dV, to which `other_dv` is added."""
    others = [] if other_dv is None else [other_dv]
    tile_KD, all_TD, _, all_T, bounds_T = _block_specs(k, tile.keys)
    return triton.call(
        functools.partial(_keys_kernel, scale=scale, tile=tile, exp2=triton.scaled_exp2(interpret)),
        name="flash_backward_keys",
        grid=_grid(k, tile.keys),
        in_specs=[all_TD, tile_KD, tile_KD, all_TD, all_T, all_T, bounds_T] + [tile_KD] * len(others),
        out_specs=[tile_KD, tile_KD],
        out_shape=[_like(k), _like(v)],
        launch=tile,
        interpret=interpret,
    )(q, k, v, dout, lse_BHT, delta_BHT, query_end_BT, *others)


def _grid(x, rows: int):
    batch, length, heads, _ = x.shape
    return heads, length // rows, batch  # the first index varies fastest


def _block_specs(x, rows: int):
    """What program (head, tile, sequence) sees: its rows or all rows of [T, D]; the same of [T]; the bounds, [T]."""
    _, length, _, width = x.shape
    return (
        pl.BlockSpec((None, rows, None, width), lambda h, i, b: (b, i, h, 0)),
        pl.BlockSpec((None, length, None, width), lambda h, i, b: (b, 0, h, 0)),
        pl.BlockSpec((None, None, rows), lambda h, i, b: (b, h, i)),
        pl.BlockSpec((None, None, length), lambda h, i, b: (b, h, 0)),
        pl.BlockSpec((None, length), lambda h, i, b: (b, 0)),
    )


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _per_query(q):
    batch, length, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)


# --- kernels ---


def _forward_kernel(q_ref, k_ref, v_ref, key_start_ref, out_ref, lse_ref, *, scale: float, tile: Tile, exp2):
    visible, first, stop = _visible_keys(key_start_ref, tile)
    q_QD = q_ref[...]

    def step(j, carry):
        out_QD, max_Q, sum_Q = carry
        keys = pl.ds(j * tile.keys, tile.keys)
        score_QK = jnp.where(visible(j), _dot(q_QD, k_ref[keys, :].T), MASKED)
        new_max_Q = jnp.maximum(max_Q, jnp.max(score_QK, axis=1) * (scale * LOG2_E))
        p_QK = exp2(score_QK, scale * LOG2_E, new_max_Q[:, None])
        decay_Q = jnp.exp2(max_Q - new_max_Q)
        v_KD = v_ref[keys, :]
        out_QD = out_QD * decay_Q[:, None] + _dot(p_QK.astype(v_KD.dtype), v_KD)
        return out_QD, new_max_Q, sum_Q * decay_Q + jnp.sum(p_QK, axis=1)

    zero_Q = jnp.zeros((tile.queries,), jnp.float32)
    start = (jnp.zeros(q_QD.shape, jnp.float32), zero_Q + LOWEST, zero_Q)
    out_QD, max_Q, sum_Q = lax.fori_loop(first, stop, step, start)
    out_ref[...] = (out_QD / sum_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_Q + jnp.log2(sum_Q)


def _queries_kernel(
    q_ref, k_ref, v_ref, out_ref, dout_ref, lse_ref, key_start_ref, dq_ref, delta_ref, *, scale, tile: Tile, exp2
):
    visible, first, stop = _visible_keys(key_start_ref, tile)
    q_QD, dout_QD, lse_Q = q_ref[...], dout_ref[...], lse_ref[...]
    delta_Q = jnp.sum(out_ref[...].astype(jnp.float32) * dout_QD.astype(jnp.float32), axis=1)
    delta_ref[...] = delta_Q

    def step(j, dq_QD):
        keys = pl.ds(j * tile.keys, tile.keys)
        k_KD = k_ref[keys, :]
        score_QK = jnp.where(visible(j), _dot(q_QD, k_KD.T), MASKED)
        p_QK = exp2(score_QK, scale * LOG2_E, lse_Q[:, None])
        dscore_QK = p_QK * (_dot(dout_QD, v_ref[keys, :].T) - delta_Q[:, None])
        return dq_QD + _dot(dscore_QK.astype(k_KD.dtype), k_KD)

    dq_QD = lax.fori_loop(first, stop, step, jnp.zeros(q_QD.shape, jnp.float32))
    dq_ref[...] = (dq_QD * scale).astype(dq_ref.dtype)


def _keys_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, query_end_ref, *refs, scale, tile: Tile, exp2):
    """On transposed tiles: probabilities come out of one product as the left factor of the next."""
    *other_dv_refs, dk_ref, dv_ref = refs
    visible, first, stop = _visible_queries(query_end_ref, tile)
    k_KD, v_KD = k_ref[...], v_ref[...]

    def step(i, carry):
        dk_KD, dv_KD = carry
        queries = pl.ds(i * tile.queries, tile.queries)
        q_QD, dout_QD = q_ref[queries, :], dout_ref[queries, :]
        # Both scores first: then the product for dV runs while dscore is computed.
        score_KQ, dp_KQ = _dot(k_KD, q_QD.T), _dot(v_KD, dout_QD.T)
        p_KQ = exp2(score_KQ, scale * LOG2_E, lse_ref[queries][None, :])
        p_KQ = jnp.where(visible(i), p_KQ, 0.0)
        dv_KD = dv_KD + _dot(p_KQ.astype(dout_QD.dtype), dout_QD)
        dscore_KQ = p_KQ * (dp_KQ - delta_ref[queries][None, :])
        return dk_KD + _dot(dscore_KQ.astype(q_QD.dtype), q_QD), dv_KD

    zero_KD = jnp.zeros(k_KD.shape, jnp.float32)
    dk_KD, dv_KD = lax.fori_loop(first, stop, step, (zero_KD, zero_KD))
    dk_ref[...] = (dk_KD * scale).astype(dk_ref.dtype)
    dv_KD = sum((ref[...].astype(jnp.float32) for ref in other_dv_refs), dv_KD)
    dv_ref[...] = dv_KD.astype(dv_ref.dtype)


# --- which tiles, and which scores in them ---


def _visible_keys(key_start_ref, tile: Tile):
    """For this program's queries: the mask [Q, K] of key tile j, and the range of j."""
    query0 = pl.program_id(1) * tile.queries
    query_Q = query0 + jnp.arange(tile.queries, dtype=jnp.int32)
    key_start_Q = key_start_ref[pl.ds(query0, tile.queries)]

    def visible(j):
        key_K = j * tile.keys + jnp.arange(tile.keys, dtype=jnp.int32)
        return _within(key_K[None, :] - key_start_Q[:, None], (query_Q - key_start_Q + 1)[:, None])

    return visible, _floor(key_start_ref[query0], tile.keys), _ceil(query0 + tile.queries, tile.keys)


def _visible_queries(query_end_ref, tile: Tile):
    """For this program's keys: the mask [K, Q] of query tile i, and the range of i."""
    key0 = pl.program_id(1) * tile.keys
    key_K = key0 + jnp.arange(tile.keys, dtype=jnp.int32)
    query_end_K = query_end_ref[pl.ds(key0, tile.keys)]

    def visible(i):
        query_Q = i * tile.queries + jnp.arange(tile.queries, dtype=jnp.int32)
        return _within(query_Q[None, :] - key_K[:, None], (query_end_K - key_K)[:, None])

    return visible, _floor(key0, tile.queries), _ceil(query_end_ref[key0 + tile.keys - 1], tile.queries)


def _within(offset, size):
    """0 <= offset < size in one comparison: as unsigned numbers, negative offsets are larger than any size."""
    return offset.astype(jnp.uint32) < size.astype(jnp.uint32)


def _floor(n, size: int):
    return lax.div(n, jnp.int32(size))  # n >= 0; `//` would also compile the rules for negative numbers


def _ceil(n, size: int):
    return _floor(n + (size - 1), size)


def _dot(a, b):
    """Product with float32 accumulation; float32 operands stay float32 (no tf32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
