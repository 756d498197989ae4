"""One layer: attention with a value residual and a squared-ReLU MLP, both on a normalised input."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.attention import Intervals, attend
from senano_jax.config import ModelConfig
from senano_jax.model.rotary import rotate

# PyTorch's rms_norm takes the float32 epsilon for bfloat16 inputs too.
NORM_EPSILON = 1.1920929e-7
ATTENTION_SCALE = 0.12  # in place of head_dim**-0.5; from modded-nanogpt


def norm(x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a gain; computed in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """Uniform with standard deviation 0.5 / sqrt(fan_in), for matrices [..., in, out]."""
    bound = 3**0.5 * 0.5 * shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def scaled(weight: Float[Array, ""], x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """A float32 scalar times x, rounded to x's type: what PyTorch makes of a zero-dimensional weight."""
    return (weight * x.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and a learned share of the first layer's values."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, first_v_BTHK, rotary, intervals: Intervals):
        """Returns the output and this layer's raw values; `first_v_BTHK` is None in position 0, which mixes nothing."""
        c = self.config
        B, T, D = x_BTD.shape
        qkv_3DD = self.param("qkv", uniform_fan_in, (3, D, D))
        out_DD = self.param("out", nn.initializers.zeros, (D, D))
        value_residual = self.param("value_residual", nn.initializers.constant(0.5), ())

        # One product, then a split: its gradient is one concatenation, where that of slices would be three padded sums.
        qkv_DE = jnp.swapaxes(qkv_3DD.astype(x_BTD.dtype), 0, 1).reshape(D, 3 * D)
        heads = (B, T, c.num_heads, c.head_dim)
        q, k, raw_v = (part.reshape(heads) for part in jnp.split(x_BTD @ qkv_DE, 3, axis=-1))
        q, k = rotate(norm(q), rotary), rotate(norm(k), rotary)
        v = raw_v
        if first_v_BTHK is not None:
            v = scaled(1 - value_residual, raw_v) + scaled(value_residual, first_v_BTHK)
        y_BTHK = attend(q, k, v, intervals, ATTENTION_SCALE, c.attention)
        return y_BTHK.reshape(B, T, D) @ out_DD.astype(x_BTD.dtype), raw_v


class Mlp(nn.Module):
    """Two matrices around relu(x)^2 (Primer, arXiv 2109.08668)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.config.dim, self.config.mlp_expansion * self.config.dim
        up_DF = self.param("up", uniform_fan_in, (D, F))
        down_FD = self.param("down", nn.initializers.zeros, (F, D))
        h_BTF = jnp.square(nn.relu(x_BTD @ up_DF.astype(x_BTD.dtype)))
        return h_BTF @ down_FD.astype(x_BTD.dtype)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, skip, x0_BTD, first_v_BTHK, rotary, intervals: Intervals):
        """Applies the layer; returns the new residual stream and the layer's raw values.

        `skip` is None or (weight, output of an earlier position), added first. `x0_BTD` is the normalised embedding,
        `first_v_BTHK` the raw values of position 0 (None in position 0).
        """
        lambdas = self.param("lambdas", lambda key: jnp.array([1.0, 0.0]))
        if skip is not None:
            x_BTD = x_BTD + scaled(*skip)
        x_BTD = scaled(lambdas[0], x_BTD) + scaled(lambdas[1], x0_BTD)
        y_BTD, raw_v = Attention(self.config, name="attention")(norm(x_BTD), first_v_BTHK, rotary, intervals)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + Mlp(self.config, name="mlp")(norm(x_BTD))
        return x_BTD, raw_v
