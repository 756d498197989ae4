"""The language model: embedding, a schedule of layers with skips over depth, output head and loss.

With N positions, the output of position i < N/2 is added back at position N-1-i. The first half of the loop's visits
emits its outputs and the second half consumes them in reverse, so the loop is two scans over one set of weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.attention import Intervals, document_start, window_intervals
from senano_jax.model.block import Block
from senano_jax.model.config import ModelConfig
from senano_jax.model.elementwise import norm, rows_of
from senano_jax.model.loss import soft_cap, soft_capped_cross_entropy
from senano_jax.model.remat import rematerialised
from senano_jax.model.rotary import rotary_tables


class Surroundings(NamedTuple):
    """What a layer sees beside the residual stream, the same for all positions after the first."""

    x0: Float[Array, "B T D"]  # normalised embedding
    first_v: Float[Array, "B T H K"] | None  # raw values of position 0; None there and with value embeddings
    value_embeddings: tuple[Float[Array, "B T H K"], ...]  # of the tokens, one a table
    rotary: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]
    windows: dict[bool, Intervals]  # by whether the layer has a long one


def apply_layer(block: Block, x: Float[Array, "B T D"], skip, around: Surroundings):
    """Gives `block` the window and the values that its layer takes; returns the residual stream, in float32, and the
    values."""
    c = block.config
    table = c.value_table(block.layer)
    if c.remat != "none":  # the layer's input is kept
        x = x.astype(around.x0.dtype)
    other_v = around.first_v if table is None else around.value_embeddings[table]
    return block(x, skip, around.x0, other_v, around.rotary, around.windows[c.layers.has_long_window(block.layer)])


class LoopVisit(nn.Module):
    """One visit of all layers of the loop."""

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        block = rematerialised(Block, c.remat, scanned=not c.unroll)
        for layer in range(layers.prelude, layers.prelude + layers.loop):
            setattr(self, f"layer_{layer}", block(c, layer))

    def __call__(self, x: Float[Array, "B T D"], skips, around: Surroundings):
        """`skips` is None in the first half of the visits, and the layers' outputs are returned, rounded, beside x.

        In the second half it is (weights [loop], one [B, T, D] a layer), to be added before each layer.
        """
        layers = self.config.layers
        outputs = []
        for j, layer in enumerate(range(layers.prelude, layers.prelude + layers.loop)):
            skip = None if skips is None else (skips[0][j], skips[1][j])
            x, _ = apply_layer(getattr(self, f"layer_{layer}"), x, skip, around)
            outputs.append(x.astype(around.x0.dtype))
        return x, tuple(outputs) if skips is None else None


class Gpt(nn.Module):
    """Parameters: embedding and value_embedding_<i> [vocab, dim] in `dtype`; head [dim, padded vocab], skip_weights
    [N/2] and the layers layer_<n>, or loop.layer_<n>, in float32."""

    config: ModelConfig
    dtype: jnp.dtype  # of activations and embedding

    def setup(self):
        c, layers = self.config, self.config.layers
        self.embedding = self._table("embedding")
        self.value_tables = [self._table(f"value_embedding_{n}") for n in range(c.value_embeddings)]
        self.head = self.param("head", nn.initializers.zeros, (c.dim, c.padded_vocab_size))
        self.skip_weights = self.param("skip_weights", nn.initializers.ones, (layers.skips,))
        block = rematerialised(Block, c.remat)
        outer = (*range(layers.prelude), *range(layers.prelude + layers.loop, layers.layers))
        for layer in outer:
            setattr(self, f"layer_{layer}", block(c, layer))
        if layers.loop:
            half = layers.visits // 2
            self.loop = nn.scan(
                LoopVisit,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=(0, nn.broadcast),
                length=half,
                unroll=half if c.unroll else 1,
            )(c)

    def _table(self, name: str) -> Float[Array, "vocab dim"]:
        def init(key):
            return jax.random.normal(key, (self.config.vocab_size, self.config.dim)).astype(self.dtype)

        return self.param(name, init)

    def __call__(
        self, inputs: Int[Array, "B T"], targets: Int[Array, "B T"], window_blocks: Int[Array, ""] | int
    ) -> Float[Array, ""]:
        """Cross-entropy summed over all tokens, float32. `window_blocks` is the long window in blocks of 128."""
        return soft_capped_cross_entropy(self.features(inputs, window_blocks), self.head, targets.astype(jnp.int32))

    def logits(
        self,
        inputs: Int[Array, "B T"],
        window_blocks: Int[Array, ""] | int,
        position: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B V"]:
        """Soft-capped logits, float32: of all tokens, for short sequences, or of the one at `position` alone."""
        x = self.features(inputs, window_blocks)
        if position is not None:
            x = x[:, position]
        return soft_cap(x @ self.head.astype(x.dtype), self.config.dim)

    def features(self, inputs: Int[Array, "B T"], window_blocks: Int[Array, ""] | int) -> Float[Array, "B T D"]:
        """Normalised residual stream that the head reads."""
        c, layers = self.config, self.config.layers
        inputs = inputs.astype(jnp.int32)
        starts = document_start(inputs)
        windows = {True: window_intervals(starts, window_blocks), False: window_intervals(starts, window_blocks // 2)}
        x0 = norm(rows_of(self.embedding, inputs, self.dtype))
        heads = (*inputs.shape, c.num_heads, c.head_dim)
        values = tuple(rows_of(table, inputs, self.dtype).reshape(heads) for table in self.value_tables)
        around = Surroundings(x0, None, values, rotary_tables(inputs.shape[1], c.head_dim), windows)

        x, outputs = x0, []
        for layer in range(layers.prelude):
            x, v = apply_layer(getattr(self, f"layer_{layer}"), x, None, around)
            if layer == 0 and not c.value_embeddings:
                around = around._replace(first_v=v)
            outputs.append(x.astype(self.dtype))

        loop_skips = layers.loop * layers.visits // 2
        loop_weights, coda_weights = self.skip_weights[:loop_skips], self.skip_weights[loop_skips:]
        if layers.loop:
            x, emitted = self.loop(x, None, around)
            mirrored = tuple(outputs[::-1] for outputs in reversed(emitted))
            x, _ = self.loop(x, (loop_weights.reshape(-1, layers.loop), mirrored), around)

        for j, layer in enumerate(range(layers.prelude + layers.loop, layers.layers)):
            skip = (coda_weights[j], outputs.pop())
            x, _ = apply_layer(getattr(self, f"layer_{layer}"), x, skip, around)
        return norm(x).astype(self.dtype)
