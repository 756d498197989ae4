"""A residual stream and its normalised copy, with one pass over memory where their two gradients meet.

XLA reads the stream and the copy's gradient twice: once for the mean along a row, once to apply it. Here a program
holds whole rows, so that everything is read once.

Names end in their dimensions: R the rows of a program, P a part of a row whose width is a power of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from senano_jax.kernels import triton, whole_rows
from senano_jax.kernels.choice import Implementation, on_gpu, takes_fused
from senano_jax.model.elementwise import NORM_EPSILON, norm

DEFAULT_LAUNCH = triton.RowLaunch(rows=4, warps=4)


def norm_fork(
    x: Float[Array, "B T D"],
    added: Float[Array, "B T D"] | None = None,
    implementation: Implementation = "auto",
    *,
    apart: int | None = None,
    rounded_gradient: bool = False,
    launch: triton.RowLaunch = DEFAULT_LAUNCH,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]] | tuple[Float[Array, "B T _"], ...]:
    """x and norm(x); or the sum of x and `added`, in float32 and not rounded, and its norm, in x's type.

    What a layer adds is small beside the stream, so that rounding the sum would lose much of it. The sum is not stored
    either: the backward pass adds its terms again.

    With `apart`, a third output is the first `apart` channels of the norm, for those who read no others: their gradient
    is added to the norm's in the same pass. That of a slice is padded to all channels and added in a pass of its own.

    The backward pass of `fused` is a Pallas kernel for NVIDIA GPUs that rounds the sum of both gradients once, and
    takes them in the types that they come in: that of a float32 stream is a product with the next layer's weight, whose
    own rounding would err the same way for all tokens. With `rounded_gradient` it rounds the stream's to x's type
    before: for a reader whose gradient has been rounded so, once. Widths are a power of two times at most 8.
    `auto` means `fused` on a GPU wherever it can; `interpret` runs it in plain XLA, the default where there is no GPU.
    """
    terms = (x,) if added is None else (x, added)
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    if not takes_fused(implementation, on_gpu(), whole_rows.fits(x.shape, launch), f"{rows} rows of {width}"):
        return _summed_and_normalised(terms, apart)
    return _fused(terms, apart, rounded_gradient, launch, not on_gpu() if interpret is None else interpret)


def _summed_and_normalised(terms, apart):
    total = terms[0] if len(terms) == 1 else sum(term.astype(jnp.float32) for term in terms)
    normed = norm(total).astype(terms[0].dtype)
    return (total, normed) if apart is None else (total, normed, normed[..., :apart])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _fused(terms, apart, rounded_gradient, launch, interpret):
    return _fused_fwd(terms, apart, rounded_gradient, launch, interpret)[0]


def _fused_fwd(terms, apart, rounded_gradient, launch, interpret):
    terms = lax.optimization_barrier(terms)  # or XLA reads all that x is the sum of a second time, to normalise it
    return _summed_and_normalised(terms, apart), terms


def _fused_bwd(apart, rounded_gradient, launch, interpret, terms, gradients):
    dx, *others = gradients
    dx = dx.astype(terms[0].dtype) if rounded_gradient else dx
    total = backward(terms, dx, *others, launch=launch, interpret=interpret)
    return ((total,) * len(terms),)


_fused.defvjp(_fused_fwd, _fused_bwd)


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def backward(terms, dx, dy, dy_apart=None, *, launch: triton.RowLaunch, interpret: bool):
    """dx + s dy - s^3 mean(x dy) x along the last axis, with x the sum of `terms` and s = (mean(x^2) + eps)^(-1/2), in
    the type of the terms. `dx` and `dy` may be of others. `dy_apart` is added to the first channels of dy."""
    gradients = [dx, dy] if dy_apart is None else [dx, dy, dy_apart]
    x, *rest = (array.reshape(-1, array.shape[-1]) for array in (*terms, *gradients))
    rows, *rest_rows = (pl.BlockSpec((launch.rows, array.shape[1]), lambda r: (r, 0)) for array in (x, *rest))
    total = triton.call(
        functools.partial(_backward_kernel, terms=len(terms)),
        name="norm_fork_backward",
        grid=(x.shape[0] // launch.rows,),
        in_specs=[rows, *rest_rows],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        launch=launch,
        interpret=interpret,
    )(x, *rest)
    return total.reshape(terms[0].shape)


def _backward_kernel(*refs, terms: int):
    *refs, total_ref = refs
    parts = whole_rows.parts_of(total_ref.shape[1])
    *of_terms, dx, dy = ([ref[:, part].astype(jnp.float32) for part in parts] for ref in refs[: terms + 2])
    for apart_ref in refs[terms + 2 :]:  # at most one
        dy = [_with_first(dy_RP, part, apart_ref) for part, dy_RP in zip(parts, dy)]
    x = [sum(of_part) for of_part in zip(*of_terms)]
    of_norm = whole_rows.norm_gradient(x, dy, NORM_EPSILON)
    for part, dx_RP, of_norm_RP in zip(parts, dx, of_norm):
        total_ref[:, part] = (dx_RP + of_norm_RP).astype(total_ref.dtype)


def _with_first(dy_RP, part: pl.Slice, apart_ref):
    """This part of the rows, with those of `apart_ref`, which end somewhere, added to it."""
    columns = apart_ref.shape[1] - part.start
    if columns <= 0:
        return dy_RP
    row_RP, column_RP = (lax.broadcasted_iota(jnp.int32, dy_RP.shape, axis) for axis in range(2))
    added_RP = triton.load(apart_ref.at[row_RP, part.start + column_RP], mask=column_RP < columns, other=0)
    return dy_RP + added_RP.astype(jnp.float32)
