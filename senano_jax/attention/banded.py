"""Attention by diagonals of 128x128 blocks in plain XLA: any backend, memory linear in T, window traced.

Query block n meets key block n - offset, for all n at once; the online softmax of FlashAttention (Dao et al.,
arXiv 2205.14135) joins the offsets. How many offsets there are is read off `key_start`, so the loop's trip count is a
traced number and the gradient is written by hand: a loop of unknown length cannot be differentiated.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from senano_jax.attention.intervals import BLOCK, Intervals

MASKED = -1e30  # finite, so that a block without a visible key gives exp(-1e30 - max) = 0 and not NaN

# Shape suffixes: N blocks of Q = K = 128 queries or keys, H heads of width D.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def banded_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
) -> Float[Array, "B T H D"]:
    """What `attend` gives, from those of the T^2 scores that lie in a band of blocks of 128 tokens."""
    return _forward(q, k, v, intervals, scale)[0]


def _forward(q, k, v, intervals, scale):
    q_BNQHD, k_BNKHD, v_BNKHD = _blocks(q), _blocks(k), _blocks(v)
    key_start_BNQ = _blocks(intervals.key_start)

    def body(offset, carry):
        max_BNHQ, sum_BNHQ, out_BNQHD = carry
        scores_BNHQK = _scores(q_BNQHD, jnp.roll(k_BNKHD, offset, axis=1), key_start_BNQ, offset, scale)
        new_max_BNHQ = jnp.maximum(max_BNHQ, scores_BNHQK.max(-1))
        weights_BNHQK = jnp.exp(scores_BNHQK - new_max_BNHQ[..., None])
        correction_BNHQ = jnp.exp(max_BNHQ - new_max_BNHQ)
        value_BNQHD = _matmul("bnhqk,bnkhd->bnqhd", weights_BNHQK, jnp.roll(v_BNKHD, offset, axis=1))
        return (
            new_max_BNHQ,
            sum_BNHQ * correction_BNHQ + weights_BNHQK.sum(-1),
            out_BNQHD * jnp.swapaxes(correction_BNHQ, 2, 3)[..., None] + value_BNQHD,
        )

    B, N, Q, H, _ = q_BNQHD.shape
    # Offset 0 comes first and every query sees itself, so the running maximum is real from the first step on.
    zeros_BNHQ = jnp.zeros((B, N, H, Q), jnp.float32)
    start = (zeros_BNHQ + MASKED, zeros_BNHQ, jnp.zeros(q_BNQHD.shape, jnp.float32))
    max_BNHQ, sum_BNHQ, out_BNQHD = jax.lax.fori_loop(0, _offsets(intervals), body, start)
    out = out_BNQHD / jnp.swapaxes(sum_BNHQ, 2, 3)[..., None]
    out = checkpoint_name(out.reshape(q.shape).astype(q.dtype), "attention_out")
    logsumexp_BNHQ = checkpoint_name(max_BNHQ + jnp.log(sum_BNHQ), "attention_lse")
    return out, (q, k, v, intervals, out, logsumexp_BNHQ)


def _backward(scale, residuals, d_out):
    q, k, v, intervals, out, logsumexp_BNHQ = residuals
    q_BNQHD, k_BNKHD, v_BNKHD, d_out_BNQHD = _blocks(q), _blocks(k), _blocks(v), _blocks(d_out)
    key_start_BNQ = _blocks(intervals.key_start)
    delta_BNQH = (_blocks(out).astype(jnp.float32) * d_out_BNQHD.astype(jnp.float32)).sum(-1)
    delta_BNHQ = jnp.swapaxes(delta_BNQH, 2, 3)

    def body(offset, carry):
        dq_BNQHD, dk_BNKHD, dv_BNKHD = carry
        key_BNKHD, value_BNKHD = jnp.roll(k_BNKHD, offset, axis=1), jnp.roll(v_BNKHD, offset, axis=1)
        scores_BNHQK = _scores(q_BNQHD, key_BNKHD, key_start_BNQ, offset, scale)
        weights_BNHQK = jnp.exp(scores_BNHQK - logsumexp_BNHQ[..., None])
        d_weights_BNHQK = _matmul("bnqhd,bnkhd->bnhqk", d_out_BNQHD, value_BNKHD)
        d_scores_BNHQK = scale * weights_BNHQK * (d_weights_BNHQK - delta_BNHQ[..., None])
        dk_here = _matmul("bnhqk,bnqhd->bnkhd", d_scores_BNHQK, q_BNQHD)
        dv_here = _matmul("bnhqk,bnqhd->bnkhd", weights_BNHQK, d_out_BNQHD)
        return (
            dq_BNQHD + _matmul("bnhqk,bnkhd->bnqhd", d_scores_BNHQK, key_BNKHD),
            dk_BNKHD + jnp.roll(dk_here, -offset, axis=1),
            dv_BNKHD + jnp.roll(dv_here, -offset, axis=1),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BNQHD, k_BNKHD, v_BNKHD))
    gradients = jax.lax.fori_loop(0, _offsets(intervals), body, start)
    dq, dk, dv = (g.reshape(x.shape).astype(x.dtype) for g, x in zip(gradients, (q, k, v)))
    return dq, dk, dv, Intervals(None, None)


banded_attention.defvjp(_forward, _backward)


def _blocks(x):
    """[B, T, ...] -> [B, N, 128, ...]."""
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def _matmul(equation, a, b):
    """A product with its left side in the type of the right one and a float32 result."""
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _offsets(intervals: Intervals):
    """Block diagonals that hold a visible pair, from the main one down."""
    query_block = jnp.arange(intervals.key_start.shape[1]) // BLOCK
    return 1 + jnp.max(query_block - intervals.key_start // BLOCK)


def _scores(q_BNQHD, key_BNKHD, key_start_BNQ, offset, scale):
    """Scaled scores of query block n with key block n - offset; float32, MASKED where the key is not visible."""
    scores_BNHQK = scale * _matmul("bnqhd,bnkhd->bnhqk", q_BNQHD, key_BNKHD)
    query_NQ = jnp.arange(q_BNQHD.shape[1] * BLOCK).reshape(-1, BLOCK)
    key_NK = query_NQ - BLOCK * offset  # negative where the roll wrapped around: below every key_start
    visible_BNQK = (key_start_BNQ[..., None] <= key_NK[:, None]) & (key_NK[:, None] <= query_NQ[..., None])
    return jnp.where(visible_BNQK[:, :, None], scores_BNHQK, MASKED)
