"""The kernels behind heads.py, for NVIDIA GPUs: of queries, keys and values and of their gradient; and of the offset of
keys and of its gradient by themselves. Each reads and writes every tensor once, but for keys a token apart.

Names end in their dimensions: R the tokens of a program, E the halves of a head between which rotary pairs lie.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from senano_jax.kernels import triton
from senano_jax.kernels.triton import HeadLaunch, Launches
from senano_jax.model.elementwise import NORM_EPSILON
from senano_jax.model.rotary import turning_pairs

STATIC = ("num_heads", "offsets_keys", "launch", "interpret")

DEFAULT_LAUNCHES = Launches(
    forward=HeadLaunch(tokens=16, heads=3, warps=4), backward=HeadLaunch(tokens=4, heads=6, warps=1)
)


# --- launches: one program a group of heads, block of tokens and sequence ---


@functools.partial(jax.jit, static_argnames=STATIC)  # lowered once for all layers
def forward(
    qkv, first_v, value_residual, rotary, num_heads: int, offsets_keys: bool, launch: HeadLaunch, interpret: bool
):
    """q, k and v, each [B, T, H, K]."""
    qkv = _apart(qkv, num_heads)
    grid, scalar, table, part, all_parts, _ = _blocks(qkv.shape, launch)
    mixed = first_v is not None
    heads = jax.ShapeDtypeStruct((*qkv.shape[:2], *qkv.shape[3:]), qkv.dtype)
    return triton.call(
        functools.partial(_forward_kernel, mixed=mixed, offsets_keys=offsets_keys),
        name="heads_forward",
        grid=grid,
        in_specs=[table, table, all_parts] + [part, scalar] * mixed + [_whole(all_parts, qkv)] * offsets_keys,
        out_specs=[part, part, part],
        out_shape=[heads, heads, heads],
        launch=launch,
        interpret=interpret,
    )(*rotary, qkv, *([first_v, value_residual.reshape(1)] if mixed else []), *[qkv] * offsets_keys)


@functools.partial(jax.jit, static_argnames=STATIC)  # lowered once for all layers
def backward(
    qkv, first_v, value_residual, rotary, dq, dk, dv, num_heads: int, offsets_keys: bool, launch: HeadLaunch,
    interpret: bool,
):  # fmt: skip
    """Gradients of qkv and value_residual; the latter is None without first_v."""
    shape, qkv = qkv.shape, _apart(qkv, num_heads)
    grid, scalar, table, part, all_parts, partial_sum = _blocks(qkv.shape, launch)
    mixed = first_v is not None
    partial_sums = jax.ShapeDtypeStruct(grid, jnp.float32)
    dqkv, *rest = triton.call(
        functools.partial(_backward_kernel, mixed=mixed, offsets_keys=offsets_keys),
        name="heads_backward",
        grid=grid,
        in_specs=[table, table, all_parts, part, part, part]
        + [part, scalar] * mixed
        + [_whole(part, dk)] * offsets_keys,
        out_specs=[all_parts] + [partial_sum] * mixed,
        out_shape=[jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)] + [partial_sums] * mixed,
        launch=launch,
        interpret=interpret,
    )(*rotary, qkv, dq, dk, dv, *([first_v, value_residual.reshape(1)] if mixed else []), *[dk] * offsets_keys)
    return dqkv.reshape(shape), jnp.sum(rest[0]) if mixed else None


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def offset_keys(k, launch: HeadLaunch, interpret: bool):
    """As that of pieces/key_offset.py, to the bit; XLA's own kernel takes three times what the memory needs."""
    batch, length, num_heads, width = k.shape
    grid, _, _, part, _, _ = _blocks((batch, length, 3, num_heads, width), launch)
    return triton.call(
        _offset_keys_kernel,
        name="offset_keys",
        grid=grid,
        in_specs=[part, _whole(part, k)],
        out_specs=part,
        out_shape=jax.ShapeDtypeStruct(k.shape, k.dtype),
        launch=launch,
        interpret=interpret,
    )(k, k)


@functools.partial(jax.jit, static_argnames=("launch", "interpret"))  # lowered once for all layers
def backward_of_offset_keys(d_product, k, k_scale, rotary, dk, launch: HeadLaunch, interpret: bool):
    """Writes the keys' third of `d_product` [B, T, 3*H, K], the gradient of the product, in place; the others stay.
    `k` are keys before the offset, normalised and turned, `k_scale` [B, H, T] what the norm multiplied them by,
    float32, and `dk` is the gradient of the keys that attention took, those with the offset."""
    shape, d_product = d_product.shape, _apart(d_product, k.shape[2])
    grid, _, table, part, all_parts, _ = _blocks(d_product.shape, launch)
    scale = pl.BlockSpec((None, *part.block_shape[2:0:-1]), lambda h, t, b: (b, h, t))
    return triton.call(
        _offset_keys_backward_kernel,
        name="offset_keys_backward",
        grid=grid,
        in_specs=[table, table, part, scale, part, _whole(part, dk), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=_keys_alone(all_parts),
        out_shape=jax.ShapeDtypeStruct(d_product.shape, d_product.dtype),
        launch=launch,
        interpret=interpret,
        written_into={6: 0},
    )(*rotary, k, k_scale, dk, dk, d_product).reshape(shape)


def _apart(qkv, num_heads: int):
    return qkv.reshape(*qkv.shape[:2], 3, num_heads, -1)


def _blocks(shape, launch: HeadLaunch):
    """The grid, and what program (heads, tokens, sequence) sees of a scalar, a table, one of q, k and v, all three,
    and an array of one number a program."""
    batch, length, _, num_heads, width = shape
    tokens, heads = launch.tokens, math.gcd(launch.heads, num_heads)
    return (
        (num_heads // heads, length // tokens, batch),  # the first index varies fastest
        pl.BlockSpec((1,), lambda h, t, b: (0,)),
        pl.BlockSpec((tokens, None, width // 2), lambda h, t, b: (t, 0, 0)),
        pl.BlockSpec((None, tokens, heads, width), lambda h, t, b: (b, t, h, 0)),
        pl.BlockSpec((None, tokens, 3, heads, width), lambda h, t, b: (b, t, 0, h, 0)),
        pl.BlockSpec((1, None, None), lambda h, t, b: (h, t, b)),
    )


def _keys_alone(all_parts: pl.BlockSpec) -> pl.BlockSpec:
    sequence, tokens, _, heads, width = all_parts.block_shape
    return pl.BlockSpec((sequence, tokens, None, heads, width), lambda h, t, b: (b, t, 1, h, 0))


def _whole(part: pl.BlockSpec, x) -> pl.BlockSpec:
    """A part's heads, of all tokens of its sequence: `x` is [B, T, ...]."""
    _, _, *rest = part.block_shape
    return pl.BlockSpec((None, x.shape[1], *rest), lambda h, t, b: (b, 0, *part.index_map(h, 0, b)[2:]))


# --- kernels ---


def _forward_kernel(cos_ref, sin_ref, qkv_ref, *refs, mixed: bool, offsets_keys: bool):
    *refs, q_ref, k_ref, v_ref = refs
    first_v_ref, weight_ref = refs[:2] if mixed else (None, None)
    whole_qkv_ref = refs[-1] if offsets_keys else None
    cos_RE, sin_RE = cos_ref[...], sin_ref[...]
    w = weight_ref[0] if mixed else None
    before_R = _tokens_before(k_ref) if offsets_keys else None

    def prepare(h, carry):
        # All loads come before the stores, which the compiler may not move them across.
        q, k, v = (_halves(qkv_ref, part, h) for part in range(3))
        if mixed:
            v = [(1 - w) * own_RE + w * first_RE for own_RE, first_RE in zip(v, _halves(first_v_ref, h))]
        if offsets_keys:
            before = _halves(whole_qkv_ref, 1, h, tokens=before_R)
        _store(q_ref, _turned(*_normalised(*q), cos_RE, sin_RE), h)
        k = _turned(*_normalised(*k), cos_RE, sin_RE)
        if offsets_keys:
            k = _with_rests(k, _normalised(*before))
        _store(k_ref, k, h)
        _store(v_ref, v, h)
        return carry

    lax.fori_loop(0, q_ref.shape[1], prepare, None)


def _backward_kernel(cos_ref, sin_ref, qkv_ref, dq_ref, dk_ref, dv_ref, *refs, mixed: bool, offsets_keys: bool):
    first_v_ref, weight_ref = refs[:2] if mixed else (None, None)
    whole_dk_ref = refs[2 * mixed] if offsets_keys else None
    dqkv_ref, dw_ref = refs[-2:] if mixed else (refs[-1], None)
    cos_RE, sin_RE = cos_ref[...], sin_ref[...]
    w = weight_ref[0] if mixed else None
    token_R = _tokens(dk_ref) if offsets_keys else None

    def pull_back(h, dw_RE):
        q, k = (_halves(qkv_ref, part, h) for part in range(2))
        dq, dk, dv = (_halves(ref, h) for ref in (dq_ref, dk_ref, dv_ref))
        if mixed:
            for dv_RE, own_RE, first_RE in zip(dv, _halves(qkv_ref, 2, h), _halves(first_v_ref, h)):
                dw_RE += dv_RE * (first_RE - own_RE)
            dv = [(1 - w) * dv_RE for dv_RE in dv]
        if offsets_keys:
            dk = _gradient_of_offset(dk, whole_dk_ref, h, token_R)
        # A rotation's transpose turns the other way.
        _store(dqkv_ref, _normalised_gradient(*q, *_turned(*dq, cos_RE, -sin_RE)), 0, h)
        _store(dqkv_ref, _normalised_gradient(*k, *_turned(*dk, cos_RE, -sin_RE)), 1, h)
        _store(dqkv_ref, dv, 2, h)
        return dw_RE

    dw_RE = lax.fori_loop(0, dq_ref.shape[1], pull_back, jnp.zeros(cos_RE.shape, jnp.float32))
    if mixed:
        dw_ref[0] = jnp.sum(dw_RE)


def _offset_keys_kernel(k_ref, whole_k_ref, out_ref):
    before_R = _tokens_before(k_ref)

    def move(h, carry):
        _store(out_ref, _with_rests(_halves(k_ref, h), _halves(whole_k_ref, h, tokens=before_R)), h)
        return carry

    lax.fori_loop(0, k_ref.shape[1], move, None)


def _offset_keys_backward_kernel(cos_ref, sin_ref, k_ref, scale_ref, dk_ref, whole_dk_ref, _, d_x_ref):
    """As `pulled_back` of attention/hopper_heads.py, after the gradient of the offset."""
    cos_RE, sin_RE, token_R = cos_ref[...], sin_ref[...], _tokens(dk_ref)

    def pull_back(h, carry):
        k, dk = _halves(k_ref, h), _gradient_of_offset(_halves(dk_ref, h), whole_dk_ref, h, token_R)
        along_R1 = _mean(*(k_RE * dk_RE for k_RE, dk_RE in zip(k, dk)))
        scale_R1 = scale_ref[h, :][:, None]
        d = [scale_R1 * (dk_RE - along_R1 * k_RE) for k_RE, dk_RE in zip(k, dk)]
        _store(d_x_ref, _turned(*d, cos_RE, -sin_RE), h)
        return carry

    lax.fori_loop(0, dk_ref.shape[1], pull_back, None)


def _with_rests(own, before):
    """The halves `own`, with the dimensions that do not turn taken from `before`."""
    return [jnp.where(_rests(own_RE), before_RE, own_RE) for own_RE, before_RE in zip(own, before)]


def _gradient_of_offset(dk, whole_dk_ref, h, token_R):
    """Of keys before it: what rests went to the next key, and the first token's to its own as well."""
    last = whole_dk_ref.shape[0] - 1
    after = _halves(whole_dk_ref, h, tokens=jnp.minimum(token_R + 1, last))
    followed_R1, first_R1 = (token_R < last)[:, None], (token_R == 0)[:, None]
    return [
        jnp.where(
            _rests(own_RE),
            jnp.where(followed_R1, after_RE, 0.0) + jnp.where(first_R1, own_RE, 0.0),
            own_RE,
        )
        for own_RE, after_RE in zip(dk, after)
    ]


def _tokens(ref):
    """int32 [R]: the places in their sequence of the tokens that `ref`, a part, holds."""
    return pl.program_id(1) * ref.shape[0] + jnp.arange(ref.shape[0], dtype=jnp.int32)


def _tokens_before(ref):
    """Those before these; the first token of a sequence is before itself."""
    return jnp.maximum(_tokens(ref) - 1, 0)


def _rests(x_RE):
    """Which numbers of a half carry no position."""
    return jnp.broadcast_to(jnp.arange(x_RE.shape[1])[None, :] >= turning_pairs(2 * x_RE.shape[1]), x_RE.shape)


def _halves(ref, *head, tokens=slice(None)):
    """The float32 [R, E] halves of one head: a pair (j, K/2 + j) lies at one place, so in one thread."""
    half = ref.shape[-1] // 2
    return ref[tokens, *head, :half].astype(jnp.float32), ref[tokens, *head, half:].astype(jnp.float32)


def _store(ref, halves, *head):
    half = ref.shape[-1] // 2
    ref[:, *head, :half], ref[:, *head, half:] = (x_RE.astype(ref.dtype) for x_RE in halves)


def _turned(x1_RE, x2_RE, cos_RE, sin_RE):
    return x1_RE * cos_RE + x2_RE * sin_RE, x2_RE * cos_RE - x1_RE * sin_RE


def _mean(x1_RE, x2_RE):
    """[R, 1]: the mean over both halves."""
    return (jnp.sum(x1_RE + x2_RE, axis=1) * (0.5 / x1_RE.shape[1]))[:, None]


def _scale(x1_RE, x2_RE):
    """[R, 1]: that of the norm."""
    return lax.rsqrt(_mean(x1_RE * x1_RE, x2_RE * x2_RE) + NORM_EPSILON)


def _normalised(x1_RE, x2_RE):
    scale_R1 = _scale(x1_RE, x2_RE)
    return x1_RE * scale_R1, x2_RE * scale_R1


def _normalised_gradient(x1_RE, x2_RE, dy1_RE, dy2_RE):
    """y = s x with s = (mean(x^2) + eps)^(-1/2), so dx = s dy - s^3 mean(x dy) x."""
    scale_R1 = _scale(x1_RE, x2_RE)
    along_R1 = scale_R1 * scale_R1 * _mean(x1_RE * dy1_RE, x2_RE * dy2_RE)
    return scale_R1 * (dy1_RE - along_R1 * x1_RE), scale_R1 * (dy2_RE - along_R1 * x2_RE)
