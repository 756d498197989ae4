"""GPT-2 (Radford et al., 2019) as llm.c trains it.

Learned positions, layer norms before attention and MLP, biases, GELU in its tanh form, and one table that embeds
tokens and reads them off. Attention is causal over the sequence, whatever the documents in it. Weights are float32
and are rounded to the type of the activations where they are used.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.attention import Intervals, attend, window_intervals
from senano_jax.model.cap import Plain
from senano_jax.model.config import Gpt2Config
from senano_jax.model.loss import cross_entropy
from senano_jax.model.remat import rematerialised
from senano_jax.model.targets import targets_of

INIT_STD = 0.02


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Computes in float32 and returns `dtype`."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class Dense(nn.Module):
    """x kernel + bias, in x's type. The bias is added in float32: its gradient is a sum over all tokens."""

    features: int
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (x @ kernel.astype(x.dtype) + bias).astype(x.dtype)


@jax.checkpoint  # keeps its input alone for the backward pass, not the float32 numbers in between
def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The tanh form, computed in float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention [B, T, D] -> [B, T, D] with biases, scaled by head_dim**-0.5."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x_BTD, intervals: Intervals):
        c = self.config
        B, T, D = x_BTD.shape
        qkv_BTE = Dense(3 * D, name="qkv")(x_BTD)
        q, k, v = (part.reshape(B, T, c.num_heads, c.head_dim) for part in jnp.split(qkv_BTE, 3, axis=-1))
        y_BTHK = attend(q, k, v, intervals, c.head_dim**-0.5, c.attention)
        return Dense(D, residual_std(c), name="out")(y_BTHK.reshape(B, T, D))


class Mlp(nn.Module):
    """Two dense layers around GELU, [B, T, D] -> [B, T, D]."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        h_BTF = Dense(c.mlp_expansion * c.dim, name="up")(x_BTD)
        return Dense(c.dim, residual_std(c), name="down")(gelu(h_BTF))


def residual_std(config: Gpt2Config) -> float:
    """Of what is added to the residual stream, once in each attention and once in each MLP."""
    return INIT_STD / (2 * config.num_layers) ** 0.5


class Gpt2Block(nn.Module):
    """A layer: attention and MLP, each of the layer norm of the stream that they are added to."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x_BTD, intervals: Intervals):
        dtype = x_BTD.dtype
        x_BTD = x_BTD + Attention(self.config, name="attention")(layer_norm(dtype, "attention_norm")(x_BTD), intervals)
        return x_BTD + Mlp(self.config, name="mlp")(layer_norm(dtype, "mlp_norm")(x_BTD))


class Gpt2(nn.Module):
    """Parameters, all float32: embedding [padded vocab, dim], position_embedding [max length, dim], the layers
    layer_<n>, and final_norm."""

    config: Gpt2Config
    dtype: jnp.dtype  # of activations

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(INIT_STD)
        self.embedding = self.param(
            "embedding", lambda *args: normal(*args).at[c.vocab_size :].set(0), (c.padded_vocab_size, c.dim)
        )
        self.position_embedding = self.param("position_embedding", normal, (c.max_length, c.dim))
        block = rematerialised(Gpt2Block, c.remat)
        for layer in range(c.num_layers):
            setattr(self, f"layer_{layer}", block(c))
        self.final_norm = layer_norm(self.dtype, None)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        window_blocks: Int[Array, ""] | int,
        *,
        loss_weights: Float[Array, "K"] | None = None,
        visits: int | None = None,
    ) -> Float[Array, ""]:
        """Cross-entropy summed over all tokens, float32; the rows that pad the table take no part in it.

        A window of at least T / 128 blocks is plain causal attention. `loss_weights` weigh the prediction of the token
        1, 2, .. K ahead; None: of the next one alone. `visits` must be None: there is no loop.
        """
        if visits is not None:
            raise ValueError(f"GPT-2 has no loop to visit {visits} times")
        asked = targets_of(targets.astype(jnp.int32), loss_weights)
        features = self.features(inputs, window_blocks)
        return cross_entropy(features, self.embedding.T, asked, Plain(self.config.vocab_size))

    def logits(
        self,
        inputs: Int[Array, "B T"],
        window_blocks: Int[Array, ""] | int,
        position: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B V"]:
        """Logits, float32, those of the padding too: of all tokens, or of the one at `position` alone."""
        x = self.features(inputs, window_blocks)
        if position is not None:
            x = x[:, position]
        return (x @ self.embedding.T.astype(x.dtype)).astype(jnp.float32)

    def features(self, inputs: Int[Array, "B T"], window_blocks: Int[Array, ""] | int) -> Float[Array, "B T D"]:
        """Normalised residual stream that the head reads."""
        inputs = inputs.astype(jnp.int32)
        intervals = window_intervals(jnp.zeros_like(inputs), window_blocks)
        x = (self.embedding[inputs] + self.position_embedding[: inputs.shape[1]]).astype(self.dtype)
        for layer in range(self.config.num_layers):
            x = getattr(self, f"layer_{layer}")(x, intervals)
        return self.final_norm(x)
