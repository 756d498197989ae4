"""One layer: attention with a value residual and a squared-ReLU MLP, both on a normalised input."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from senano_jax.attention import Intervals, attend
from senano_jax.model.config import ModelConfig
from senano_jax.model.elementwise import weighted_sum
from senano_jax.model.heads import prepare_heads
from senano_jax.model.norm_fork import norm_fork
from senano_jax.model.squared_relu import squared_relu_mlp

ATTENTION_SCALE = 0.12  # in place of head_dim**-0.5; from modded-nanogpt


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """Uniform with standard deviation 0.5 / sqrt(fan_in), for matrices [..., in, out]."""
    bound = 3**0.5 * 0.5 * shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and a learned share of values from elsewhere."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, other_v_BTHK, rotary, intervals: Intervals):
        """Returns the output and the values it weighs.

        `other_v_BTHK` is those of position 0 or the tokens' value embeddings. None mixes nothing: what position 0
        returns is later positions' `other_v_BTHK`.
        """
        c = self.config
        B, T, D = x_BTD.shape
        qkv_3DD = self.param("qkv", uniform_fan_in, (3, D, D))
        out_DD = self.param("out", nn.initializers.zeros, (D, D))

        # One product, so that its gradient is one too.
        qkv_DE = jnp.swapaxes(qkv_3DD.astype(x_BTD.dtype), 0, 1).reshape(D, 3 * D)
        qkv_BTE = x_BTD @ qkv_DE
        if c.value_embeddings:
            lambdas = self.param("value_lambdas", nn.initializers.constant(0.5), (2,))
            q, k, v = prepare_heads(qkv_BTE, None, jnp.float32(0), rotary, c.num_heads)
            others = [] if other_v_BTHK is None else [(lambdas[1], other_v_BTHK)]
            v = weighted_sum((lambdas[0], v), *others, dtype=v.dtype)
        else:
            value_residual = self.param("value_residual", nn.initializers.constant(0.5), ())
            q, k, v = prepare_heads(qkv_BTE, other_v_BTHK, value_residual, rotary, c.num_heads)
        y_BTHK = attend(q, k, v, intervals, ATTENTION_SCALE, c.attention)
        return y_BTHK.reshape(B, T, D) @ out_DD.astype(x_BTD.dtype), v


class Mlp(nn.Module):
    """Two matrices around relu(x)^2."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.config.dim, self.config.mlp_expansion * self.config.dim
        up_DF = self.param("up", uniform_fan_in, (D, F))
        down_FD = self.param("down", nn.initializers.zeros, (F, D))
        return squared_relu_mlp(x_BTD, up_DF.astype(x_BTD.dtype), down_FD.astype(x_BTD.dtype))


class Block(nn.Module):
    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x_BTD, skip, x0_BTD, other_v_BTHK, rotary, intervals: Intervals):
        """Applies the layer; returns the new residual stream and the layer's values (raw ones in position 0).

        The stream is rounded once, after the weighted sum at the start. It comes back in float32, its sum with the
        outputs of attention and MLP not rounded; callers round what they store.
        `x_BTD` may be of either type. `skip` is None or (weight, output of an earlier position), added first. `x0_BTD`
        is the normalised embedding, `other_v_BTHK` the values that the layer's attention mixes in. A layer without
        attention returns no values.
        """
        lambdas = self.param("lambdas", lambda key: jnp.array([1.0, 0.0]))
        skips = [] if skip is None else [(lambdas[0] * skip[0], skip[1])]
        x_BTD = weighted_sum((lambdas[0], x_BTD), *skips, (lambdas[1], x0_BTD), dtype=x0_BTD.dtype)
        y_BTD, v_BTHK = None, None
        if self.layer not in self.config.layers.no_attention:
            x_BTD, normed_BTD = norm_fork(x_BTD)
            y_BTD, v_BTHK = Attention(self.config, name="attention")(normed_BTD, other_v_BTHK, rotary, intervals)
        x_BTD, normed_BTD = norm_fork(x_BTD, y_BTD)
        mlp_BTD = Mlp(self.config, name="mlp")(normed_BTD)
        return x_BTD.astype(jnp.float32) + mlp_BTD.astype(jnp.float32), v_BTHK
