"""Exclusive attention and the gate on its heads in one pass over memory, forward and backward.

Both are elementwise or a sum over one head. XLA makes a kernel of each sum and of each output, and rounds in between.

Names end in their dimensions: R the tokens of a program, K the width of a head.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from senano_jax.kernels import triton
from senano_jax.kernels.choice import Implementation, on_gpu, takes_fused
from senano_jax.kernels.triton import HeadLaunch, Launches
from senano_jax.model.pieces.exclusive import SMALLEST, Exclusive, without_own_value
from senano_jax.model.pieces.head_gate import HeadGate

DEFAULT_LAUNCHES = Launches(
    forward=HeadLaunch(tokens=8, heads=6, warps=2), backward=HeadLaunch(tokens=16, heads=3, warps=4)
)


class GatedExclusive(NamedTuple):
    """Two pieces as one."""

    exclusive: Exclusive
    head_gate: HeadGate

    def after(
        self,
        y_BTHK: Float[Array, "B T H K"],
        v_BTHK: Float[Array, "B T H K"],
        x_BTD: Float[Array, "B T D"],
        visit: Int[Array, ""] | int,
    ) -> Float[Array, "B T H K"]:
        """What both give, one after the other, rounded once."""
        return gated_exclusive(y_BTHK, v_BTHK, self.exclusive.shares(visit), self.head_gate.shares(x_BTD, visit))


def gated_exclusive(
    y: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    share_H: Float[Array, "H"],
    gate_BTH: Float[Array, "B T H"],
    implementation: Implementation = "auto",
    *,
    launches: Launches[HeadLaunch] = DEFAULT_LAUNCHES,
    interpret: bool | None = None,
) -> Float[Array, "B T H K"]:
    """gate (y - share (y . v) / |v|^2 v) by token and head, computed in float32 and rounded once, to y's type; shares
    and gates are float32, squared lengths below 1e-8 count as that.

    `fused` runs two Pallas kernels for NVIDIA GPUs, for lengths that are multiples of its tokens per program and heads
    whose width is a power of two from 16 up. `auto` takes it on a GPU wherever it can. `interpret` runs the kernels in
    plain XLA, the default where there is no GPU.
    """
    length, width = y.shape[1], y.shape[3]
    fits = triton.fits(width) and length % launches.forward.tokens == 0 and length % launches.backward.tokens == 0
    if not takes_fused(implementation, on_gpu(), fits, f"a length of {length} and heads of {width}"):
        return (gate_BTH[..., None] * without_own_value(y, v, share_H)).astype(y.dtype)
    return _fused(y, v, share_H, gate_BTH, launches, not on_gpu() if interpret is None else interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(y, v, share_H, gate_BTH, launches, interpret):
    return forward(y, v, share_H, gate_BTH, launches.forward, interpret)


def _fused_fwd(y, v, share_H, gate_BTH, launches, interpret):
    return _fused(y, v, share_H, gate_BTH, launches, interpret), (y, v, share_H, gate_BTH)


def _fused_bwd(launches, interpret, residuals, gradient):
    return backward(*residuals, gradient, launches.backward, interpret)


_fused.defvjp(_fused_fwd, _fused_bwd)


# --- launches: one program a group of heads, block of tokens and sequence ---


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def forward(y, v, share_H, gate_BTH, launch: HeadLaunch, interpret: bool):
    """Like y."""
    grid, of_heads, numbers, rows, _ = _blocks(y.shape, launch)
    return triton.call(
        _forward_kernel,
        name="gated_exclusive_forward",
        grid=grid,
        in_specs=[of_heads, numbers, rows, rows],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        launch=launch,
        interpret=interpret,
    )(share_H, gate_BTH, y, v)


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def backward(y, v, share_H, gate_BTH, gradient, launch: HeadLaunch, interpret: bool):
    """Gradients of y, v, share and gate."""
    grid, of_heads, numbers, rows, sums = _blocks(y.shape, launch)
    batch, length, num_heads, _ = y.shape
    dy, dv, d_gate, d_share = triton.call(
        _backward_kernel,
        name="gated_exclusive_backward",
        grid=grid,
        in_specs=[of_heads, numbers, rows, rows, rows],
        out_specs=[rows, rows, numbers, sums],
        out_shape=[
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(gate_BTH.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, length // launch.tokens, num_heads), jnp.float32),
        ],
        launch=launch,
        interpret=interpret,
    )(share_H, gate_BTH, y, v, gradient)
    return dy, dv, jnp.sum(d_share, axis=(0, 1)), d_gate


def _blocks(shape, launch: HeadLaunch):
    """The grid, and what program (heads, tokens, sequence) sees of a number a head, of one a token and head, of rows,
    and of one a block of tokens and head."""
    batch, length, num_heads, width = shape
    tokens, heads = launch.tokens, math.gcd(launch.heads, num_heads)
    return (
        (num_heads // heads, length // tokens, batch),  # the first index varies fastest
        pl.BlockSpec((heads,), lambda h, t, b: (h,)),
        pl.BlockSpec((None, tokens, heads), lambda h, t, b: (b, t, h)),
        pl.BlockSpec((None, tokens, heads, width), lambda h, t, b: (b, t, h, 0)),
        pl.BlockSpec((None, None, heads), lambda h, t, b: (b, t, h)),
    )


# --- kernels ---


def _forward_kernel(share_ref, gate_ref, y_ref, v_ref, out_ref):
    def one_head(h, carry):
        y_RK, v_RK = (ref[:, h, :].astype(jnp.float32) for ref in (y_ref, v_ref))
        along_R = _dot(y_RK, v_RK) / jnp.maximum(_dot(v_RK, v_RK), SMALLEST)
        out_RK = gate_ref[:, h][:, None] * (y_RK - (share_ref[h] * along_R)[:, None] * v_RK)
        out_ref[:, h, :] = out_RK.astype(out_ref.dtype)
        return carry

    jax.lax.fori_loop(0, y_ref.shape[1], one_head, None)


def _backward_kernel(share_ref, gate_ref, y_ref, v_ref, gradient_ref, dy_ref, dv_ref, d_gate_ref, d_share_ref):
    """With out = gate z and z = y - share along v, where along = (y . v) / length and length = max(|v|^2, 1e-8)."""

    def one_head(h, carry):
        y_RK, v_RK, gradient_RK = (ref[:, h, :].astype(jnp.float32) for ref in (y_ref, v_ref, gradient_ref))
        share, gate_R = share_ref[h], gate_ref[:, h]
        square_R = _dot(v_RK, v_RK)
        length_R = jnp.maximum(square_R, SMALLEST)
        along_R = _dot(y_RK, v_RK) / length_R
        gradient_v_R = _dot(gradient_RK, v_RK)
        dz_v_R = gate_R * gradient_v_R
        across_R = share * dz_v_R / length_R
        dz_RK = gate_R[:, None] * gradient_RK
        of_v_R = jnp.where(square_R > SMALLEST, 2 * across_R * along_R, 0.0)
        dy_RK = dz_RK - across_R[:, None] * v_RK
        dv_RK = of_v_R[:, None] * v_RK - (share * along_R)[:, None] * dz_RK - across_R[:, None] * y_RK
        dy_ref[:, h, :], dv_ref[:, h, :] = dy_RK.astype(dy_ref.dtype), dv_RK.astype(dv_ref.dtype)
        d_gate_ref[:, h] = _dot(gradient_RK, y_RK) - share * along_R * gradient_v_R
        d_share_ref[h] = -jnp.sum(along_R * dz_v_R)
        return carry

    jax.lax.fori_loop(0, y_ref.shape[1], one_head, None)


def _dot(a_RK, b_RK):
    return jnp.sum(a_RK * b_RK, axis=1)
