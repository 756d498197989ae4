"""The first half of a layer with skip connections: h = w x + w_skip skip + w_x0 x_0, and norm(h).

XLA's backward pass reads the gradient of h once for that of each weight, beside x, which was not stored and is the sum
of three arrays; and it stores w times that gradient in float32, since a product of two rounded numbers must not be
rounded (docs/parity.md). Here one kernel, which holds whole rows, makes all of these of one reading, and rounds w times
the gradient of h before that itself is rounded.

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

DEFAULT_LAUNCH = triton.RowLaunch(rows=1, warps=1)


class MixWeights(NamedTuple):
    """Of the stream, of the skip connection and of the embedding. Float32."""

    x: Float[Array, ""]
    skip: Float[Array, ""] | None
    x0: Float[Array, ""]


def stream_mix(
    x: Float[Array, "B T D"],
    skip: Float[Array, "B T D"] | None,
    x0: Float[Array, "B T D"],
    weights: MixWeights,
    implementation: Implementation = "auto",
    *,
    launch: triton.RowLaunch = DEFAULT_LAUNCH,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """h = weights.x x + weights.skip skip + weights.x0 x0, rounded once, and norm(h), both in x0's type.

    The backward pass of `fused` is a Pallas kernel for NVIDIA GPUs, for rows as norm_fork takes them. The gradient that
    it gives x is rounded to x0's type, once. That of weights.x it knows from h in place of x, which it does not read:
    it must not be 0. `auto` means `fused` on a GPU wherever it can; `interpret` runs it in plain XLA, the default where
    there is no GPU.
    """
    if not is_fused(x.shape, implementation, launch):
        mixed = _mixed(x, skip, x0, weights)
        return mixed, norm(mixed)
    return _fused(x, skip, x0, weights, launch, not on_gpu() if interpret is None else interpret)


def is_fused(
    shape: tuple[int, int, int], implementation: Implementation = "auto", launch: triton.RowLaunch = DEFAULT_LAUNCH
) -> bool:
    """Whether stream_mix takes the kernel for [B, T, D]. Raises ValueError where it is asked for and cannot run."""
    batch, length, width = shape
    what = f"{batch * length} rows of {width}"
    return takes_fused(implementation, on_gpu(), whole_rows.fits(shape, launch), what)


def _mixed(x, skip, x0, weights):
    skips = [] if skip is None else [(weights.skip, skip)]
    return weighted_sum((weights.x, x), *skips, (weights.x0, x0), dtype=x0.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(x, skip, x0, weights, launch, interpret):
    return _fused_fwd(x, skip, x0, weights, launch, interpret)[0]


def _fused_fwd(x, skip, x0, weights, launch, interpret):
    skip = lax.optimization_barrier(skip)  # or XLA adds that up a second time, of three arrays it keeps till then
    mixed = lax.optimization_barrier(_mixed(x, skip, x0, weights))  # or XLA adds it up again to normalise it
    of_type = jnp.zeros(0, x.dtype)
    return (mixed, norm(mixed)), (mixed, skip, x0, weights, of_type)


def _fused_bwd(launch, interpret, residuals, gradients):
    mixed, skip, x0, weights, of_type = residuals
    d_mixed, d_x, d_weights = backward(mixed, skip, x0, weights, *gradients, launch=launch, interpret=interpret)
    # Left to XLA, which adds the embedding's of all layers in one pass, and the skip connection's to the stream's.
    d_x0 = weighted_sum((weights.x0, d_mixed), dtype=x0.dtype)
    d_skip = None if skip is None else weighted_sum((weights.skip, d_mixed), dtype=skip.dtype)
    return d_x.astype(of_type.dtype), d_skip, d_x0, d_weights


_fused.defvjp(_fused_fwd, _fused_bwd)


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def backward(mixed, skip, x0, weights: MixWeights, dy, d_normed, *, launch: triton.RowLaunch, interpret: bool):
    """Gradients of the mixture and of x, both in x0's type, and of the weights, given those of the mixture, where
    others read it, and of its norm."""
    width = mixed.shape[-1]
    flat = (mixed.size // width, width)
    programs = flat[0] // launch.rows
    terms = [mixed, x0] + ([] if skip is None else [skip])
    rows, number = pl.BlockSpec((launch.rows, width), lambda r: (r, 0)), pl.BlockSpec((1,), lambda r: (r,))
    d_mixed, d_x, *partial_sums = triton.call(
        _backward_kernel,
        name="stream_mix_backward",
        grid=(programs,),
        in_specs=[pl.BlockSpec((1,), lambda r: (0,))] + [rows] * (2 + len(terms)),
        out_specs=[rows, rows] + [number] * len(terms),
        out_shape=[jax.ShapeDtypeStruct(flat, x0.dtype)] * 2
        + [jax.ShapeDtypeStruct((programs,), jnp.float32)] * len(terms),
        launch=launch,
        interpret=interpret,
    )(weights.x.reshape(1), *(array.reshape(flat) for array in (dy, d_normed, *terms)))
    along_mixed, along_x0, *along_skip = map(jnp.sum, partial_sums)
    # Along x alone: what is left of the mixture without its other terms.
    along_x = along_mixed - weights.x0 * along_x0 - sum(weights.skip * along for along in along_skip)
    d_weights = MixWeights(along_x / weights.x, along_skip[0] if along_skip else None, along_x0)
    return d_mixed.reshape(mixed.shape), d_x.reshape(mixed.shape), d_weights


def _backward_kernel(weight_x_ref, dy_ref, d_normed_ref, *refs):
    terms = (len(refs) - 2) // 2
    parts = whole_rows.parts_of(dy_ref.shape[1])
    dy, d_normed, mixed, *others = (
        [ref[:, part].astype(jnp.float32) for part in parts] for ref in (dy_ref, d_normed_ref, *refs[:terms])
    )
    d_mixed_ref, d_x_ref, *sum_refs = refs[terms:]
    of_norm = whole_rows.norm_gradient(mixed, d_normed, NORM_EPSILON)
    d_mixed = [dy_RP + of_norm_RP for dy_RP, of_norm_RP in zip(dy, of_norm)]
    for part, d_mixed_RP in zip(parts, d_mixed):
        d_mixed_ref[:, part] = d_mixed_RP.astype(d_mixed_ref.dtype)
        d_x_ref[:, part] = (weight_x_ref[0] * d_mixed_RP).astype(d_x_ref.dtype)
    for sum_ref, term in zip(sum_refs, (mixed, *others)):
        sum_ref[0] = whole_rows.dot(d_mixed, term)
