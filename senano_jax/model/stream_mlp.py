"""The second half of a layer whose residual stream has weights: s = w0 x + w1 x_0 + added, then w2 s + mlp(norm s).

XLA's backward pass reads the stream once for each weight's gradient, again for the norm's, and stores w2 times the
gradient in float32. Here one kernel, which holds whole rows, makes all of these of one reading. It takes the gradients
on both sides of the MLP, so the function that has it as its derivative contains the MLP.

Names end in their dimensions: R the rows of a program, P a part of a row whose width is a power of two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from senano_jax.kernels import triton, whole_rows
from senano_jax.kernels.choice import Implementation, on_gpu, takes_fused
from senano_jax.model.elementwise import NORM_EPSILON, norm, weighted_sum
from senano_jax.model.squared_relu import squared_relu_mlp

DEFAULT_LAUNCH = triton.RowLaunch(rows=2, warps=2)


class StreamWeights(NamedTuple):
    """Of the stream and of the embedding in the sum, and of the sum in what comes out. Float32."""

    x: Float[Array, ""]
    x0: Float[Array, ""]
    sum: Float[Array, ""]


def stream_mlp(
    x: Float[Array, "B T D"],
    x0: Float[Array, "B T D"],
    added: Float[Array, "B T D"] | None,
    weights: StreamWeights,
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    implementation: Implementation = "auto",
    *,
    launch: triton.RowLaunch = DEFAULT_LAUNCH,
    interpret: bool | None = None,
) -> Float[Array, "B T D"]:
    """With s = weights.x x + weights.x0 x0 + added: weights.sum s + mlp(norm(s)), float32 and not rounded, nor is s.

    The backward pass of `fused` is a Pallas kernel for NVIDIA GPUs, for rows as norm_fork takes them. It rounds the
    gradient that it is given to the type of x, which changes nothing where a single reader rounds what comes out to
    that type, as trunks do. `auto` means `fused` on a GPU wherever it can; `interpret` runs it in plain XLA, the
    default where there is no GPU.
    """
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    if not takes_fused(implementation, on_gpu(), whole_rows.fits(x.shape, launch), f"{rows} rows of {width}"):
        return _plain(x, x0, added, weights, up, down)
    return _fused(x, x0, added, weights, up, down, launch, not on_gpu() if interpret is None else interpret)


def _plain(x, x0, added, weights, up, down):
    total, normed = _summed_and_normalised(x, x0, added, weights)
    with jax.named_scope("mlp"):
        out = squared_relu_mlp(normed, up, down)
    return _with_mlp(total, out, weights)


def _summed_and_normalised(x, x0, added, weights):
    terms = [(weights.x, x), (weights.x0, x0)] + ([] if added is None else [(1.0, added)])
    total = weighted_sum(*terms, dtype=jnp.float32)
    return total, norm(total).astype(x.dtype)


def _with_mlp(total, out, weights):
    return weighted_sum((weights.sum, total), (1.0, out), dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _fused(x, x0, added, weights, up, down, launch, interpret):
    return _fused_fwd(x, x0, added, weights, up, down, launch, interpret)[0]


def _fused_fwd(x, x0, added, weights, up, down, launch, interpret):
    kept = x, x0, added, weights  # not what the barrier returns: a scan would store that again, for x0 at every visit
    x, added = lax.optimization_barrier((x, added))  # or XLA reads all that x is the sum of a second time
    total, normed = _summed_and_normalised(x, x0, added, weights)
    with jax.named_scope("mlp"):
        out, pull_back = jax.vjp(squared_relu_mlp, normed, up, down)
    return _with_mlp(total, out, weights), (*kept, pull_back)


def _fused_bwd(launch, interpret, residuals, gradient):
    x, x0, added, weights, pull_back = residuals
    gradient = gradient.astype(x.dtype)
    with jax.named_scope("mlp"):
        d_normed, d_up, d_down = pull_back(gradient)
    d_sum, d_x, d_weights = backward(x, x0, added, weights, gradient, d_normed, launch=launch, interpret=interpret)
    d_x0 = weighted_sum((weights.x0, d_sum), dtype=x0.dtype)  # left to XLA, which adds those of all layers in one pass
    return d_x, d_x0, None if added is None else d_sum, d_weights, d_up, d_down


_fused.defvjp(_fused_fwd, _fused_bwd)


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def backward(x, x0, added, weights: StreamWeights, d_out, d_normed, *, launch: triton.RowLaunch, interpret: bool):
    """Gradients of the sum and of x, both in x's type, and of the weights, given that of what comes out and that of the
    sum's norm."""
    width = x.shape[-1]
    flat = (x.size // width, width)
    programs = flat[0] // launch.rows
    rows, number = pl.BlockSpec((launch.rows, width), lambda r: (r, 0)), pl.BlockSpec((1,), lambda r: (r,))
    all_weights = pl.BlockSpec((3,), lambda r: (0,))
    terms = [x, x0] + ([] if added is None else [added])
    d_sum, d_x, *partial_sums = triton.call(
        _backward_kernel,
        name="stream_mlp_backward",
        grid=(programs,),
        in_specs=[all_weights] + [rows] * (len(terms) + 2),
        out_specs=[rows, rows, number, number, number],
        out_shape=[jax.ShapeDtypeStruct(flat, x.dtype)] * 2 + [jax.ShapeDtypeStruct((programs,), jnp.float32)] * 3,
        launch=launch,
        interpret=interpret,
    )(jnp.stack(weights), *(array.reshape(flat) for array in (d_out, d_normed, *terms)))
    return d_sum.reshape(x.shape), d_x.reshape(x.shape), StreamWeights(*map(jnp.sum, partial_sums))


def _backward_kernel(weights_ref, d_out_ref, d_normed_ref, *refs):
    *term_refs, d_sum_ref, d_x_ref, weight_x_ref, weight_x0_ref, weight_sum_ref = refs
    of_x, of_x0, of_sum = (weights_ref[i] for i in range(3))
    parts = whole_rows.parts_of(d_sum_ref.shape[1])
    d_out, d_normed, x, x0, *added = (
        [ref[:, part].astype(jnp.float32) for part in parts] for ref in (d_out_ref, d_normed_ref, *term_refs)
    )
    total = [of_x * x_RP + of_x0 * x0_RP + sum(rest) for x_RP, x0_RP, *rest in zip(x, x0, *added)]
    of_norm = whole_rows.norm_gradient(total, d_normed, NORM_EPSILON)
    d_sum = [of_sum * d_out_RP + of_norm_RP for d_out_RP, of_norm_RP in zip(d_out, of_norm)]
    for part, d_sum_RP in zip(parts, d_sum):
        d_sum_ref[:, part] = d_sum_RP.astype(d_sum_ref.dtype)
        d_x_ref[:, part] = (of_x * d_sum_RP).astype(d_x_ref.dtype)
    weight_x_ref[0], weight_x0_ref[0] = whole_rows.dot(d_sum, x), whole_rows.dot(d_sum, x0)
    weight_sum_ref[0] = whole_rows.dot(d_out, total)
