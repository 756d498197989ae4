"""The two elementwise functions that all parts of the model share, with PyTorch's roundings."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# PyTorch's rms_norm takes the float32 epsilon for bfloat16 inputs too.
NORM_EPSILON = 1.1920929e-7


def norm(x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a gain; computed in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


def scaled(weight: Float[Array, ""], x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """A float32 scalar times x, rounded to x's type: what PyTorch makes of a zero-dimensional weight."""
    return (weight * x.astype(jnp.float32)).astype(x.dtype)
