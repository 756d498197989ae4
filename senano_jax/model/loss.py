"""Output head, soft-cap if any, and cross-entropy in one function that never holds all logits.

logits = 30 * sigmoid(z / (7.5 * sqrt(dim))) with z = x @ head (Gemma 2's soft-cap, arXiv 2408.00118, lowered to 15 and
shifted by 15 as in modded-nanogpt: 15 * tanh(u) + 15 = 30 * sigmoid(2u)). The loss is a sum over tokens and its
gradient is linear in the cotangent, so the forward pass of a differentiated call already makes both gradients, a chunk
of tokens at a time: logits are computed once, never kept, never recomputed.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.kernels.choice import on_gpu
from senano_jax.model import loss_kernel

SOFT_CAP = 30.0
# Tokens whose logits exist at a time: 0.8 GB of bfloat16 over 50,304 columns. A CPU has no use for more than its cache.
CHUNK_TOKENS = 8192
CHUNK_TOKENS_CPU = 128


def soft_capped_cross_entropy(
    x: Float[Array, "B T dim"],
    head: Float[Array, "dim V"],
    targets: Int[Array, "B T"],
    chunk_tokens: int | None = None,
) -> Float[Array, ""]:
    """Sum over all tokens of the cross-entropy (natural log, float32) of soft-capped logits.

    `x @ head` is computed and rounded in x's type, everything after it in float32. `chunk_tokens` bounds the tokens
    whose logits exist at a time; it changes nothing but memory and speed.
    """
    return _chunked_loss(x, head, targets, chunk_tokens or _chunk_tokens(), None)


def cross_entropy(
    x: Float[Array, "B T dim"],
    head: Float[Array, "dim V"],
    targets: Int[Array, "B T"],
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> Float[Array, ""]:
    """The same without a soft-cap: `x @ head` are the logits, the first `vocab_size` of which are in the softmax."""
    return _chunked_loss(x, head, targets, chunk_tokens or _chunk_tokens(), vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked_loss(x, head, targets, chunk_tokens, vocab_size):
    chunks_x, chunks_targets = _chunks(x, targets, chunk_tokens)
    weights = head.astype(x.dtype)

    def body(total, chunk):
        x_ND, targets_N = chunk
        z_NV = x_ND @ weights
        logsumexp_N = _logsumexp(z_NV, x.shape[-1], vocab_size)
        return total + _loss(z_NV, targets_N, logsumexp_N, x.shape[-1], vocab_size), None

    return jax.lax.scan(body, jnp.float32(0), (chunks_x, chunks_targets))[0]


def soft_cap(z: Float[Array, "*S V"], dim: int) -> Float[Array, "*S V"]:
    """Logits in (0, 30) from the head's products; float32."""
    return SOFT_CAP * jax.nn.sigmoid(z.astype(jnp.float32) / _scale(dim))


def _scale(dim: int) -> float:
    """What the sigmoid divides the products by."""
    return 7.5 * dim**0.5


def _logits(z_NV, dim, vocab_size):
    """Under the soft-cap if `vocab_size` is None, here and below; else those beyond it are -inf. Float32."""
    if vocab_size is None:
        return soft_cap(z_NV, dim)
    return jnp.where(jnp.arange(z_NV.shape[1]) < vocab_size, z_NV.astype(jnp.float32), -jnp.inf)


def _loss(z_NV, targets_N, logsumexp_N, dim, vocab_size):
    target_z_N = jnp.take_along_axis(z_NV, targets_N[:, None], axis=1)[:, 0]
    target_N = soft_cap(target_z_N, dim) if vocab_size is None else target_z_N.astype(jnp.float32)
    return (logsumexp_N - target_N).sum()


def _logsumexp(z_NV, dim, vocab_size):
    logits_NV = _logits(z_NV, dim, vocab_size)
    if vocab_size is None:
        # Logits lie in (0, 30), so exp cannot overflow and the usual pass for the maximum is spared.
        return jnp.log(jnp.exp(logits_NV).sum(-1))
    return jax.nn.logsumexp(logits_NV, axis=-1)


def _logsumexp_and_gradient(z_NV, targets_N, dim, vocab_size):
    """The logits' log-sum-exp (float32) and the gradient of z (its type)."""
    capped = vocab_size is None
    if capped and on_gpu() and loss_kernel.fits(*z_NV.shape):
        return loss_kernel.logsumexp_and_gradient(z_NV, targets_N, cap=SOFT_CAP, slope=1 / _scale(dim))
    logsumexp_N = _logsumexp(z_NV, dim, vocab_size)
    logits_NV = _logits(z_NV, dim, vocab_size)
    hit_NV = targets_N[:, None] == jnp.arange(logits_NV.shape[1])
    dz_NV = jnp.exp(logits_NV - logsumexp_N[:, None]) - hit_NV
    if capped:
        dz_NV *= logits_NV * (1 - logits_NV / SOFT_CAP) / _scale(dim)
    return logsumexp_N, dz_NV.astype(z_NV.dtype)


def _forward(x, head, targets, chunk_tokens, vocab_size):
    chunks_x, chunks_targets = _chunks(x, targets, chunk_tokens)
    weights_DV = head.astype(x.dtype)
    dim = x.shape[-1]

    def body(carry, chunk):
        total, d_head_DV = carry
        x_ND, targets_N = chunk
        z_NV = x_ND @ weights_DV
        logsumexp_N, dz_NV = _logsumexp_and_gradient(z_NV, targets_N, dim, vocab_size)
        loss = _loss(z_NV, targets_N, logsumexp_N, dim, vocab_size)
        d_head_DV += jnp.matmul(x_ND.T, dz_NV, preferred_element_type=jnp.float32)
        return (total + loss, d_head_DV), dz_NV @ weights_DV.T

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), d_x = jax.lax.scan(body, start, (chunks_x, chunks_targets))
    return total, (d_x.reshape(x.shape), d_head.astype(head.dtype))


def _backward(chunk_tokens, vocab_size, residuals, cotangent):
    d_x, d_head = residuals
    return (cotangent * d_x).astype(d_x.dtype), (cotangent * d_head).astype(d_head.dtype), None


_chunked_loss.defvjp(_forward, _backward)


def _chunk_tokens() -> int:
    return CHUNK_TOKENS_CPU if jax.default_backend() == "cpu" else CHUNK_TOKENS


def _chunks(x, targets, chunk_tokens):
    """[B, T, dim] and [B, T] -> [chunks, N, dim] and [chunks, N], with N the largest divisor within bounds."""
    tokens = targets.size
    size = next(n for n in range(min(chunk_tokens, tokens), 0, -1) if tokens % n == 0)
    return x.reshape(-1, size, x.shape[-1]), targets.reshape(-1, size)
