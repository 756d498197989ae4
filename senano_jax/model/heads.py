"""From the product of all projections to the queries, keys and values that attention takes.

All of it is elementwise or a mean over one head, so its cost is memory traffic. XLA makes a kernel of each reduction
and of each output; here forward and backward are one kernel each (heads_kernels.py).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.kernels import triton
from senano_jax.kernels.choice import Implementation, on_gpu, takes_fused
from senano_jax.kernels.triton import HeadLaunch, Launches
from senano_jax.model.elementwise import norm, weighted_sum
from senano_jax.model.heads_kernels import DEFAULT_LAUNCHES, backward, forward
from senano_jax.model.pieces.key_offset import offset_keys
from senano_jax.model.rotary import rotate

RotaryTables = tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]


def prepare_heads(
    qkv: Float[Array, "B T 3*H*K"],
    first_v: Float[Array, "B T H K"] | None,
    value_residual: Float[Array, ""],
    rotary: RotaryTables,
    num_heads: int,
    implementation: Implementation = "auto",
    *,
    offsets_keys: bool = False,
    launches: Launches[HeadLaunch] = DEFAULT_LAUNCHES,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Queries and keys, normalised and turned by their positions, and values mixed with those of the first layer.

    With value_residual w, values are (1 - w) v + w first_v. Without `first_v` they are v itself: the first layer finds
    here what later layers take as `first_v`. `offsets_keys` gives keys those dimensions of the key before them that
    carry no position (pieces/key_offset.py).

    `fused` runs two Pallas kernels for NVIDIA GPUs, which round once where `plain` rounds q and k after each step, and
    which give the rotary tables no gradient. It takes lengths that are multiples of its tokens per program and heads
    whose width is a power of two from 16 up. `auto` takes it on a GPU wherever it can. `interpret` runs the kernels in
    plain XLA, the default where there is no GPU.
    """
    length, width = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    fits = triton.fits(width) and length % launches.forward.tokens == 0 and length % launches.backward.tokens == 0
    if not takes_fused(implementation, on_gpu(), fits, f"a length of {length} and heads of {width}"):
        return _plain(qkv, first_v, value_residual, rotary, num_heads, offsets_keys)
    interpret = not on_gpu() if interpret is None else interpret
    return _fused(qkv, first_v, value_residual, rotary, num_heads, offsets_keys, launches, interpret)


def _plain(qkv, first_v, value_residual, rotary, num_heads, offsets_keys):
    # A split's gradient is one concatenation, where that of slices would be three padded sums.
    heads = (*qkv.shape[:2], num_heads, -1)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
    if first_v is not None:
        v = weighted_sum((1 - value_residual, v), (value_residual, first_v), dtype=v.dtype)
    q, k = (rotate(norm(x), rotary) for x in (q, k))
    return q, offset_keys(k) if offsets_keys else k, v


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _fused(qkv, first_v, value_residual, rotary, num_heads, offsets_keys, launches, interpret):
    return forward(qkv, first_v, value_residual, rotary, num_heads, offsets_keys, launches.forward, interpret)


def _fused_fwd(qkv, first_v, value_residual, rotary, num_heads, offsets_keys, launches, interpret):
    out = forward(qkv, first_v, value_residual, rotary, num_heads, offsets_keys, launches.forward, interpret)
    return out, (qkv, first_v, value_residual, rotary)


def _fused_bwd(num_heads, offsets_keys, launches, interpret, residuals, gradients):
    _, first_v, value_residual, _ = residuals
    d_qkv, d_value_residual = backward(*residuals, *gradients, num_heads, offsets_keys, launches.backward, interpret)
    # Left to XLA, which adds those of all layers in one pass.
    d_first_v = None if first_v is None else weighted_sum((value_residual, gradients[2]), dtype=first_v.dtype)
    return d_qkv, d_first_v, d_value_residual, None  # the tables are constants


_fused.defvjp(_fused_fwd, _fused_bwd)
