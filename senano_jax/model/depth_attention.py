"""Attention over depth: a mixture of what earlier layers made, with weights that each token computes.

    l_s = query . norm(v_s) / sqrt(D)        over the sources v_s: the first `count` blocks, and what is not complete
    read = n sum_s softmax(l)_s v_s          n the number of sources: with equal weights it is their sum

XLA reads all sources twice in each direction, those that are not complete among them, and adds up the gradients of a
block from all its readers in passes of their own. Here a program holds whole rows, reads those of complete sources and,
in the backward direction, reads them a second time from cache. The blocks go through each reader, so that on the way
back each adds its gradient to that of the readers after it, in place.

Names end in their dimensions: S sources, R the rows of a program, P a part of a row whose width is a power of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from senano_jax.kernels import triton, whole_rows
from senano_jax.kernels.choice import Implementation, on_gpu, takes_fused
from senano_jax.model.elementwise import NORM_EPSILON, norm

DEFAULT_LAUNCHES = triton.Launches(
    forward=triton.RowLaunch(rows=8, warps=8), backward=triton.RowLaunch(rows=4, warps=4)
)


def attend_depth(
    blocks: Float[Array, "S B T D"],
    own: Float[Array, "B T D"] | None,
    query: Float[Array, "D"],
    count: Int[Array, ""],
    implementation: Implementation = "auto",
    *,
    launches: triton.Launches[triton.RowLaunch] = DEFAULT_LAUNCHES,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "S B T D"]]:
    """What is read, computed in float32 and rounded once, to the blocks' type; and the blocks, for the next reader.

    Only the first `count` blocks, at least one, are sources, and `own`, if there is one.

    `fused` is a pair of Pallas kernels for NVIDIA GPUs, for rows as norm_fork takes them. It adds the two gradients of
    a block in float32 and rounds their sum; `plain` rounds its own before. `auto` means `fused` on a GPU wherever it
    can; `interpret` runs it in plain XLA, the default where there is no GPU.
    """
    shape = blocks.shape[1:]
    what = f"{shape[0] * shape[1]} rows of {shape[2]}"
    fits = whole_rows.fits(shape, launches.forward) and whole_rows.fits(shape, launches.backward)
    if not takes_fused(implementation, on_gpu(), fits, what):
        return _plain(blocks, own, query, count), blocks
    return _fused(blocks, own, query, count, launches, not on_gpu() if interpret is None else interpret)


def _plain(blocks, own, query, count):
    sources = blocks if own is None else jnp.concatenate([blocks, own[None]])
    v_SBTD = sources.astype(jnp.float32)
    l_SBT = jnp.sum(norm(v_SBTD) * query, axis=-1) * query.size**-0.5
    number = jnp.arange(len(sources))
    is_source_S = (number < count) | (number >= len(blocks))
    p_SBT = jax.nn.softmax(jnp.where(is_source_S[:, None, None], l_SBT, -jnp.inf), axis=0)
    return (jnp.sum(is_source_S) * jnp.sum(p_SBT[..., None] * v_SBTD, axis=0)).astype(blocks.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(blocks, own, query, count, launches, interpret):
    return _fused_fwd(blocks, own, query, count, launches, interpret)[0]


def _fused_fwd(blocks, own, query, count, launches, interpret):
    read, lse = forward(blocks, own, query, count, launch=launches.forward, interpret=interpret)
    return (read, blocks), (blocks, own, query, count, lse)


def _fused_bwd(launches, interpret, residuals, gradients):
    return *backward(*residuals, *gradients, launch=launches.backward, interpret=interpret), None


_fused.defvjp(_fused_fwd, _fused_bwd)


class _Specs:
    """Of arrays [S, rows, D], [rows, D] and [rows, 1], and of numbers and vectors that all programs read."""

    def __init__(self, blocks, launch: triton.RowLaunch):
        S, *_, D = blocks.shape
        self.blocks = pl.BlockSpec((S, launch.rows, D), lambda r: (0, r, 0))
        self.rows = pl.BlockSpec((launch.rows, D), lambda r: (r, 0))
        self.number = pl.BlockSpec((launch.rows, 1), lambda r: (r, 0))
        self.count, self.query = pl.BlockSpec((1,), lambda r: (0,)), pl.BlockSpec((1, D), lambda r: (0, 0))
        self.of_program = pl.BlockSpec((1, D), lambda r: (r, 0))


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all readers
def forward(blocks, own, query, count, *, launch: triton.RowLaunch, interpret: bool):
    """What is read, and the logarithm of the sum of exp(l_s), [rows, 1]."""
    S, B, T, D = blocks.shape
    specs = _Specs(blocks, launch)
    of_own = [] if own is None else [own.reshape(B * T, D)]
    read, lse = triton.call(
        _forward_kernel,
        name="depth_attention",
        grid=(B * T // launch.rows,),
        in_specs=[specs.count, specs.query, specs.blocks] + [specs.rows] * len(of_own),
        out_specs=[specs.rows, specs.number],
        out_shape=[
            jax.ShapeDtypeStruct((B * T, D), blocks.dtype),
            jax.ShapeDtypeStruct((B * T, 1), jnp.float32),
        ],
        launch=launch,
        interpret=interpret,
    )(count.reshape(1), query.reshape(1, D), blocks.reshape(S, B * T, D), *of_own)
    return read.reshape(B, T, D), lse


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))
def backward(blocks, own, query, count, lse, d_read, d_blocks, *, launch: triton.RowLaunch, interpret: bool):
    """Gradients of the blocks, those of their later readers among them, of `own` and of the query."""
    S, B, T, D = blocks.shape
    specs = _Specs(blocks, launch)
    programs = B * T // launch.rows
    of_own = [] if own is None else [own.reshape(B * T, D)]
    d_blocks, d_queries, *d_own = triton.call(
        _backward_kernel,
        name="depth_attention_backward",
        grid=(programs,),
        in_specs=[specs.count, specs.query, specs.number, specs.rows, specs.blocks, specs.blocks]
        + [specs.rows] * len(of_own),
        out_specs=[specs.blocks, specs.of_program] + [specs.rows] * len(of_own),
        out_shape=[
            jax.ShapeDtypeStruct((S, B * T, D), blocks.dtype),
            jax.ShapeDtypeStruct((programs, D), jnp.float32),
        ]
        + [jax.ShapeDtypeStruct((B * T, D), blocks.dtype)] * len(of_own),
        launch=launch,
        interpret=interpret,
        written_into={5: 0},  # or blocks that are not complete would have no gradient at all
    )(
        count.reshape(1),
        query.reshape(1, D),
        lse,
        d_read.reshape(B * T, D),
        blocks.reshape(S, B * T, D),
        d_blocks.reshape(S, B * T, D),
        *of_own,
    )
    d_own = d_own[0].reshape(B, T, D) if d_own else None
    return d_blocks.reshape(blocks.shape), d_own, jnp.sum(d_queries, axis=0)


def _logit(v, query):
    """l [R, 1] of a source; the parts of v are [R, P], those of the query [1, P]. And what its gradient is made of: the
    scale of the norm, and the mean of v query."""
    width = len(v) * v[0].shape[1]
    scale_R1 = lax.rsqrt(whole_rows.mean(v, v) + NORM_EPSILON)
    along_R1 = whole_rows.mean(v, query)
    return along_R1 * scale_R1 * width**0.5, scale_R1, along_R1


def _forward_kernel(count_ref, query_ref, blocks_ref, *refs):
    *own_refs, read_ref, lse_ref = refs
    rows, width = read_ref.shape
    parts = whole_rows.parts_of(width)
    query = [query_ref[:, part] for part in parts]

    def with_source(v, state):
        """The greatest logit, the sum of exponents below it, and the sum of sources with these as weights."""
        greatest_R1, total_R1, mixed = state
        l_R1, *_ = _logit(v, query)
        new_R1 = jnp.maximum(greatest_R1, l_R1)
        kept_R1, e_R1 = jnp.exp(greatest_R1 - new_R1), jnp.exp(l_R1 - new_R1)
        mixed = tuple(kept_R1 * mixed_RP + e_R1 * v_RP for mixed_RP, v_RP in zip(mixed, v))
        return new_R1, kept_R1 * total_R1 + e_R1, mixed

    none = tuple(jnp.zeros((rows, part.size), jnp.float32) for part in parts)
    state = jnp.full((rows, 1), -jnp.inf, jnp.float32), jnp.zeros((rows, 1), jnp.float32), none
    state = lax.fori_loop(0, count_ref[0], lambda s, state: with_source(_rows(blocks_ref, parts, s), state), state)
    for own_ref in own_refs:
        state = with_source(_rows(own_ref, parts), state)
    greatest_R1, total_R1, mixed = state
    scale_R1 = (count_ref[0] + len(own_refs)).astype(jnp.float32) / total_R1
    for part, mixed_RP in zip(parts, mixed):
        read_ref[:, part] = (scale_R1 * mixed_RP).astype(read_ref.dtype)
    lse_ref[:, :] = greatest_R1 + jnp.log(total_R1)


def _backward_kernel(count_ref, query_ref, lse_ref, d_read_ref, blocks_ref, d_later_ref, *refs):
    of_own = (len(refs) - 2) // 2
    own_refs, (d_blocks_ref, d_query_ref), d_own_refs = refs[:of_own], refs[of_own : of_own + 2], refs[of_own + 2 :]
    rows, width = d_read_ref.shape
    parts = whole_rows.parts_of(width)
    query = [query_ref[:, part] for part in parts]
    d_read = _rows(d_read_ref, parts)
    sources = (count_ref[0] + of_own).astype(jnp.float32)
    lse_R1 = lse_ref[:, :]

    def of_weight(v):
        """The weight p [R, 1] of a source, its gradient, and what _logit gives beside the logit."""
        l_R1, scale_R1, along_R1 = _logit(v, query)
        return jnp.exp(l_R1 - lse_R1), sources * width * whole_rows.mean(d_read, v), scale_R1, along_R1

    def with_weight(v, sum_R1):
        p_R1, d_p_R1, *_ = of_weight(v)
        return sum_R1 + p_R1 * d_p_R1

    # What is read would tell this sum, but rounded, with an error that is not small beside differences of weights.
    mean_R1 = jnp.zeros((rows, 1), jnp.float32)
    mean_R1 = lax.fori_loop(0, count_ref[0], lambda s, mean: with_weight(_rows(blocks_ref, parts, s), mean), mean_R1)
    for own_ref in own_refs:
        mean_R1 = with_weight(_rows(own_ref, parts), mean_R1)

    def of_source(v, d_query):
        """The gradient of a source, and that of the query with what comes by way of this source."""
        p_R1, d_p_R1, scale_R1, along_R1 = of_weight(v)
        of_norm_R1 = p_R1 * (d_p_R1 - mean_R1) * scale_R1 * width**-0.5
        along_R1 = scale_R1 * scale_R1 * along_R1
        d_v = [
            sources * p_R1 * d_read_RP + of_norm_R1 * (query_1P - along_R1 * v_RP)
            for d_read_RP, query_1P, v_RP in zip(d_read, query, v)
        ]
        return d_v, tuple(d_query_RP + of_norm_R1 * v_RP for d_query_RP, v_RP in zip(d_query, v))

    def of_block(s, d_query):
        d_v, d_query = of_source(_rows(blocks_ref, parts, s), d_query)
        for part, d_v_RP, d_later_RP in zip(parts, d_v, _rows(d_later_ref, parts, s)):
            d_blocks_ref[s, :, part] = (d_later_RP + d_v_RP).astype(d_blocks_ref.dtype)
        return d_query

    d_query = tuple(jnp.zeros((rows, part.size), jnp.float32) for part in parts)
    d_query = lax.fori_loop(0, count_ref[0], of_block, d_query)
    for own_ref, d_own_ref in zip(own_refs, d_own_refs):
        d_v, d_query = of_source(_rows(own_ref, parts), d_query)
        for part, d_v_RP in zip(parts, d_v):
            d_own_ref[:, part] = d_v_RP.astype(d_own_ref.dtype)
    for part, d_query_RP in zip(parts, d_query):
        d_query_ref[:, part] = jnp.sum(d_query_RP, axis=0)[None]


def _rows(ref, parts, *block):
    """Whole rows of a program, part by part, float32; of a block, if the array has several."""
    return [ref[*block, :, part].astype(jnp.float32) for part in parts]
