"""Output head, logits and cross-entropy in one function that never holds all logits.

With z = x @ head and logits = cap(z), the loss of a token is that of K predictions from its one row of logits,
sum_k w_k (logsumexp(logits) - logits[target_k]). The loss is a sum over tokens and its gradient is linear in the
cotangent, so the forward pass of a differentiated call already makes both gradients, a chunk of tokens at a time:
logits are computed once, never kept, never recomputed. On Hopper GPUs a call without gradients stores no logits at all
(hopper_logsumexp.py).

Names end in their dimensions: N the tokens of a chunk, D the width, V the columns of the head, K the predictions.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.kernels.choice import on_gpu
from senano_jax.model import hopper_logsumexp, long_sum, loss_kernel
from senano_jax.model.cap import Plain, capped
from senano_jax.model.elementwise import columns_as_rows
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import Targets

# Tokens whose logits exist at a time: 0.8 GB of bfloat16 over 50,304 columns. A CPU has no use for more than its cache.
CHUNK_TOKENS = 8192
CHUNK_TOKENS_CPU = 128


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Targets,
    cap: SoftCap | Plain,
    chunk_tokens: int | None = None,
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies (natural log, float32) of all tokens' predictions.

    `x @ head` is computed and rounded in x's type, everything after it in float32. `chunk_tokens` bounds the tokens
    whose logits exist at a time; it changes nothing but memory and speed.
    """
    if isinstance(cap, SoftCap):
        cap = capped(cap, x.shape[-1])
    return _chunked_loss(x, head, targets, chunk_tokens or _chunk_tokens(), cap)


def loss_is_fused(tokens: int, columns: int, cap: SoftCap | Plain) -> bool:
    """Whether this device computes log-sum-exp and gradient of `tokens` rows of logits in one kernel, or XLA does."""
    return _is_fused(_chunk_size(tokens, _chunk_tokens()), columns, cap)


def _is_fused(tokens, columns, cap) -> bool:
    return isinstance(cap, SoftCap) and on_gpu() and loss_kernel.fits(tokens, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked_loss(x, head, targets, chunk_tokens, cap):
    head_DV = head.astype(x.dtype)
    if isinstance(cap, SoftCap) and hopper_logsumexp.fits(x.size // x.shape[-1], *head.shape, x.dtype):
        return _loss_without_logits(x, head_DV, targets, cap)

    def body(total, chunk):
        x_ND, targets_NK, weights_NK = chunk
        z_NV = x_ND @ head_DV
        logsumexp_N = cap.logsumexp(cap.all_logits(z_NV))
        return total + _loss(_of_targets(z_NV, targets_NK), weights_NK, logsumexp_N, cap), None

    return jax.lax.scan(body, jnp.float32(0), _chunks(x, targets, chunk_tokens))[0]


def _loss_without_logits(x, head_DV, targets, cap):
    x_ND, targets_NK, weights_NK = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), (x, *targets))
    logsumexp_N = hopper_logsumexp.logsumexp(x_ND, head_DV, cap=cap.height, slope=1 / cap.divisor, shift=cap.shift)
    columns_NKD = columns_as_rows(head_DV)[targets_NK]
    z_NK = (x_ND[:, None].astype(jnp.float32) * columns_NKD.astype(jnp.float32)).sum(-1).astype(x.dtype)
    return _loss(z_NK, weights_NK, logsumexp_N, cap)


def _of_targets(z_NV, targets_NK):
    return jnp.take_along_axis(z_NV, targets_NK, axis=1)


def _loss(z_NK, weights_NK, logsumexp_N, cap):
    """Of the products with the targets' columns of the head and the log-sum-exp of all logits."""
    target_NK = cap.logits(z_NK)
    if weights_NK is None:
        return (logsumexp_N - target_NK[:, 0]).sum()
    return (weights_NK * (logsumexp_N[:, None] - target_NK)).sum()


def _logsumexp_and_gradient(z_NV, targets_NK, weights_NK, cap):
    """The logits' log-sum-exp (float32) and the gradient of z, in its type."""
    if _is_fused(*z_NV.shape, cap):
        return loss_kernel.logsumexp_and_gradient(
            z_NV, targets_NK, weights_NK, cap=cap.height, slope=1 / cap.divisor, shift=cap.shift
        )
    logits_NV = cap.all_logits(z_NV)
    logsumexp_N = cap.logsumexp(logits_NV)
    columns = jnp.arange(logits_NV.shape[1])
    d_logits_NV = jnp.exp(logits_NV - logsumexp_N[:, None])
    if weights_NK is None:
        d_logits_NV -= targets_NK == columns
    else:
        d_logits_NV *= weights_NK.sum(-1, keepdims=True)
        for k in range(targets_NK.shape[1]):
            d_logits_NV -= jnp.where(targets_NK[:, k, None] == columns, weights_NK[:, k, None], 0)
    return logsumexp_N, cap.pulled_back(d_logits_NV, logits_NV).astype(z_NV.dtype)


def _forward(x, head, targets, chunk_tokens, cap):
    head_DV = head.astype(x.dtype)

    def body(carry, chunk):
        total, d_head_DV = carry
        x_ND, targets_NK, weights_NK = chunk
        z_NV = x_ND @ head_DV
        logsumexp_N, dz_NV = _logsumexp_and_gradient(z_NV, targets_NK, weights_NK, cap)
        loss = _loss(_of_targets(z_NV, targets_NK), weights_NK, logsumexp_N, cap)
        d_head_DV += jnp.matmul(x_ND.T, dz_NV, preferred_element_type=jnp.float32)
        return (total + loss, d_head_DV), _gradient_of_x(dz_NV, head_DV)

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, d_head), d_x = jax.lax.scan(body, start, _chunks(x, targets, chunk_tokens))
    return total, (d_x.reshape(x.shape), d_head.astype(head.dtype))


def _gradient_of_x(dz_NV, head_DV):
    parts = long_sum.parts_of(dz_NV.shape[1]) if on_gpu() and dz_NV.dtype == jnp.bfloat16 else 1
    return dz_NV @ head_DV.T if parts == 1 else long_sum.rows_product(dz_NV, head_DV, parts)


def _backward(chunk_tokens, cap, residuals, cotangent):
    return (*jax.tree.map(lambda gradient: (cotangent * gradient).astype(gradient.dtype), residuals), None)


_chunked_loss.defvjp(_forward, _backward)


def _chunk_tokens() -> int:
    return CHUNK_TOKENS_CPU if jax.default_backend() == "cpu" else CHUNK_TOKENS


def _chunk_size(tokens: int, most: int) -> int:
    """The largest divisor of `tokens` within bounds."""
    return next(n for n in range(min(most, tokens), 0, -1) if tokens % n == 0)


def _chunks(x, targets, chunk_tokens):
    """x [chunks, N, D], target tokens [chunks, N, K] and their weights, alike or None."""
    tokens, weights = targets
    size = _chunk_size(tokens.size // tokens.shape[-1], chunk_tokens)
    return jax.tree.map(lambda array: array.reshape(-1, size, array.shape[-1]), (x, tokens, weights))
