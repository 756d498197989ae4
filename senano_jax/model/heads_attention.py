"""Attention over queries, keys and values as `prepare_heads` makes them of a product.

For Hopper GPUs the two have one gradient: the kernels that add up those of queries, keys and values go on to that of
the product which these were made of, so that the former never reach memory. They share one buffer, of which each
writes its own heads. Nor need the product itself be stored: the kernel that multiplies makes queries, keys and values
of it. Only the offset of keys, which crosses from token to token, has passes of its own, one forward and one backward.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from senano_jax.attention import Implementation, Intervals, attend, takes_hopper
from senano_jax.attention.hopper_backward_keys import backward_to_product
from senano_jax.attention.hopper_backward_queries import backward_queries
from senano_jax.attention.hopper_forward import forward
from senano_jax.attention.hopper_heads import Mixed, Turned
from senano_jax.attention.hopper_tiles import DEFAULT_STAGES
from senano_jax.kernels.choice import on_gpu
from senano_jax.model import heads_kernels, heads_product
from senano_jax.model.elementwise import weighted_sum
from senano_jax.model.heads import RotaryTables, prepare_heads
from senano_jax.model.rotary import turning_pairs


def attend_product(
    x: Float[Array, "B T D"],
    w: Float[Array, "D S*3*H*K"],
    first_v: Float[Array, "B S*T H K"] | None,
    value_residual: Float[Array, ""],
    rotary: RotaryTables,
    intervals: Intervals,
    num_heads: int,
    scale: float,
    implementation: Implementation = "auto",
    *,
    slots: int = 1,
    offsets_keys: bool = False,
    with_values: bool = False,
    values: Callable[[Float[Array, "B S*T H K"]], Float[Array, "B S*T H K"]] | None = None,
) -> tuple[Float[Array, "B S*T H K"], Float[Array, "B S*T H K"]]:
    """Attention's output and the values that it weighed, of queries, keys and values that are made of x w.

    A row of x w holds S `slots`, each a row of `num_heads` heads; the sequence is S T long. What is mixed in, `rotary`
    and `offsets_keys` are those of `prepare_heads`, the other arguments those of `attend`, with its errors. `values`,
    if it is given, makes of the values those that attention takes.

    Where a kernel takes all of it, x w is neither stored nor rounded.
    """
    batch, length, depth = x.shape
    rows, width = slots * length, w.shape[1] // (slots * 3 * num_heads)
    fits = heads_product.fits(batch, length, depth, num_heads, width, x.dtype)
    if fits and values is None and takes_hopper(implementation, rows, width, x.dtype):
        static = num_heads, float(scale), slots, offsets_keys
        return _fused(x, w, first_v, value_residual, rotary, intervals, *static)
    qkv = (x @ w).reshape(batch, rows, -1)
    q, k, v = prepare_heads(qkv, first_v, value_residual, rotary, num_heads, offsets_keys=offsets_keys)
    if values is not None:
        v = values(v)
    out = attend(q, k, v, intervals, scale, implementation, with_values=with_values)
    return out if with_values else (out, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _fused(x, w, first_v, value_residual, rotary, intervals, num_heads, scale, slots, offsets_keys):
    heads = heads_product.heads_matmul(x, w, first_v, value_residual, rotary, num_heads, slots)
    k = _with_offset(heads.k) if offsets_keys else heads.k
    out, _ = forward(heads.q, k, heads.v, intervals.key_start, scale, DEFAULT_STAGES.forward)
    return out, heads.v


def _fused_fwd(x, w, first_v, value_residual, rotary, intervals, num_heads, scale, slots, offsets_keys):
    inputs = x, w, first_v, value_residual, rotary, intervals
    inputs = x, w, first_v, value_residual, rotary, intervals = jax.tree.map(lambda primal: primal.value, inputs)
    heads = heads_product.heads_matmul(x, w, first_v, value_residual, rotary, num_heads, slots, with_residuals=True)
    k = _with_offset(heads.k) if offsets_keys else heads.k
    out, lse_BHT = forward(heads.q, k, heads.v, intervals.key_start, scale, DEFAULT_STAGES.forward)
    out = checkpoint_name(out, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return (out, heads.v), (*inputs, heads, k, out, lse_BHT)


def _fused_bwd(num_heads, scale, slots, offsets_keys, residuals, gradients):
    x, w, first_v, value_residual, rotary, intervals, heads, k, out, lse_BHT = residuals
    mixed = None if first_v is None else Mixed(heads.own_v, first_v, value_residual.reshape(1))
    turned_q, turned_k = _turned(heads.q_scale, heads.k_scale, rotary)
    if offsets_keys:
        turned_k = None  # the gradient of these keys is stored, for a kernel of its own
    d_product, others = _gradient(
        heads.q, k, heads.v, out, lse_BHT, intervals, scale, turned_q, turned_k, mixed, gradients
    )
    if offsets_keys:
        launch = heads_kernels.DEFAULT_LAUNCHES.backward
        d_product = heads_kernels.backward_of_offset_keys(
            d_product, heads.k, heads.k_scale, rotary, others["dk"], launch, not on_gpu()
        )
    x_ND, d_NE = x.reshape(-1, x.shape[2]), d_product.reshape(-1, w.shape[1])
    d_x, d_w = (d_NE @ w.T).reshape(x.shape), x_ND.T @ d_NE
    return d_x, d_w, *_gradients_of_mixed(mixed, others), None, None  # tables and bounds are constants


# Symbolic zeros: where nothing else reads the values, no zeros are stored to be added to their gradient.
_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


def _with_offset(k):
    return heads_kernels.offset_keys(k, heads_kernels.DEFAULT_LAUNCHES.forward, not on_gpu())


def _turned(q_scale, k_scale, rotary):
    """How queries and keys were made."""
    return (Turned(x_scale, *rotary, turning_pairs(2 * rotary[0].shape[-1])) for x_scale in (q_scale, k_scale))


def _gradient(q, k, v, out, lse_BHT, intervals, scale, turned_q, turned_k, mixed, gradients):
    """Of the product, [B, T, 3*H, K], given those of the output and of the values; and what `backward_to_product`
    gives beside it."""
    dout, other_dv = (None if isinstance(gradient, SymbolicZero) else gradient for gradient in gradients)
    if dout is None:
        dout = jnp.zeros_like(out)
    d_product, delta_BHT = backward_queries(
        q, k, v, out, dout, lse_BHT, intervals.key_start, scale, DEFAULT_STAGES.dq, turned_q
    )
    return backward_to_product(
        d_product, q, k, v, dout, lse_BHT, delta_BHT, intervals.query_end, scale, DEFAULT_STAGES.dkv,
        other_dv, turned_k, mixed,
    )  # fmt: skip


def _gradients_of_mixed(mixed, others):
    """Of first_v and of its share."""
    if mixed is None:
        return None, None
    # Left to XLA, which adds those of all layers in one pass.
    d_first_v = weighted_sum((mixed.first_share[0], others["dv"]), dtype=mixed.first_v.dtype)
    return d_first_v, jnp.sum(others["d_first_share"])
