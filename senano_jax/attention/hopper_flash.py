"""Flash attention over intervals for Hopper GPUs, three kernels in Pallas's Mosaic GPU.

What flash.py computes, with the same results but for the order of its sums. There Triton decides when data move; here
a warpgroup of its own copies tiles to shared memory and the others run asynchronous products of the tensor cores, whose
left factor may come from registers, so that weights never leave them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from senano_jax.attention.hopper_backward_keys import backward_keys
from senano_jax.attention.hopper_backward_queries import backward_queries
from senano_jax.attention.hopper_forward import forward
from senano_jax.attention.hopper_tiles import DEFAULT_STAGES, SWIZZLED, Stages
from senano_jax.attention.intervals import BLOCK, Intervals
from senano_jax.kernels import hopper_matmul


def runs_here() -> bool:
    """Whether the default device is a Hopper GPU, and JAX new enough to compile for it."""
    return hopper_matmul.runs_here()


def fits(length: int, width: int, dtype) -> bool:
    """Whether the kernels take [B, length, H, width] of this dtype."""
    # Rows are loaded in pieces of 64 numbers; the sums of wider heads than two do not fit in registers.
    return dtype == jnp.bfloat16 and length % BLOCK == 0 and width in (SWIZZLED, 2 * SWIZZLED)


def hopper_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
    with_values: bool = False,
    *,
    stages: Stages = DEFAULT_STAGES,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """Softmax attention of each query over its interval of keys; bfloat16.

    T must be a multiple of 128, D 64 or 128, scale positive. Out and its log-sum-exp are named "attention_out" and
    "attention_lse" for rematerialisation policies.
    """
    _, length, _, width = q.shape
    if length % BLOCK:
        raise ValueError(f"hopper_attention needs a length that is a multiple of {BLOCK}, got {length}")
    if not fits(length, width, q.dtype):
        raise ValueError(f"hopper_attention needs bfloat16 heads 64 or 128 wide, got {q.dtype} and {width}")
    if not scale > 0:
        raise ValueError(f"hopper_attention needs a positive scale, got {scale}")
    return _attention(q, k, v, intervals, float(scale), with_values, stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, intervals, scale, with_values, stages):
    out, _ = forward(q, k, v, intervals.key_start, scale, stages.forward)
    return (out, v) if with_values else out


def _attention_fwd(q, k, v, intervals, scale, with_values, stages):
    out, lse_BHT = forward(q, k, v, intervals.key_start, scale, stages.forward)
    out = checkpoint_name(out, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return (out, v) if with_values else out, (q, k, v, intervals, out, lse_BHT)


def _attention_bwd(scale, with_values, stages, residuals, gradients):
    q, k, v, intervals, out, lse_BHT = residuals
    dout, other_dv = gradients if with_values else (gradients, None)
    dq, delta_BHT = backward_queries(q, k, v, out, dout, lse_BHT, intervals.key_start, scale, stages.dq)
    dk, dv = backward_keys(q, k, v, dout, lse_BHT, delta_BHT, intervals.query_end, scale, stages.dkv, other_dv)
    return dq, dk, dv, None  # the bounds are integers


_attention.defvjp(_attention_fwd, _attention_bwd)
