"""The language model: tables by token, a trunk of layers, the output head and the loss."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.attention import document_start, window_intervals
from senano_jax.model.cap import capped
from senano_jax.model.config import ModelConfig
from senano_jax.model.context import Context
from senano_jax.model.elementwise import columns_as_rows, norm, rows_of
from senano_jax.model.loss import cross_entropy
from senano_jax.model.pieces.paired_heads import slots_of
from senano_jax.model.rotary import rotary_tables
from senano_jax.model.targets import targets_of
from senano_jax.model.trunks import trunk_of

TIED_DEVIATION = 0.005  # of a table that is both embedding and head, at the start; from modded-nanogpt


class Gpt(nn.Module):
    """Parameters: embedding [vocab, dim], unless it is the head, and value_embedding_<i> [vocab, dim] in `dtype`; head
    [dim, padded vocab] and those of the trunk in float32.

    Profiles tell the parts of a step by the names of `features` and of the layers' scopes (profiling/hlo.py).
    """

    config: ModelConfig
    dtype: jnp.dtype  # of activations and embedding

    def setup(self):
        c = self.config
        self.embedding = None if c.tied else self._table("embedding")
        self.value_tables = [self._table(f"value_embedding_{n}") for n in range(c.value_embeddings)]
        zeros, small = nn.initializers.zeros, nn.initializers.normal(TIED_DEVIATION)
        self.head = self.param("head", small if c.tied else zeros, (c.dim, c.padded_vocab_size))
        self.trunk = trunk_of(c)
        nn.share_scope(self, self.trunk)

    def _table(self, name: str) -> Float[Array, "vocab dim"]:
        def init(key):
            return jax.random.normal(key, (self.config.vocab_size, self.config.dim)).astype(self.dtype)

        return self.param(name, init)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        window_blocks: Int[Array, ""] | int,
        *,
        loss_weights: Float[Array, "K"] | None = None,
        visits: int | None = None,
    ) -> Float[Array, ""]:
        """Cross-entropy summed over all tokens, float32.

        `window_blocks` is the long window in blocks of 128. `loss_weights` weigh the prediction of the token 1, 2, .. K
        ahead; None: of the next one alone. `visits` of the loop, None: as configured.
        """
        asked = targets_of(targets.astype(jnp.int32), loss_weights)
        return cross_entropy(self.features(inputs, window_blocks, visits), self.head, asked, self.config.cap)

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
        return capped(self.config.cap, self.config.dim).logits(x @ self.head.astype(x.dtype))

    def features(
        self, inputs: Int[Array, "B T"], window_blocks: Int[Array, ""] | int, visits: int | None = None
    ) -> Float[Array, "B T D"]:
        """Normalised residual stream that the head reads."""
        c = self.config
        inputs = inputs.astype(jnp.int32)
        starts = document_start(inputs)
        windows = {True: window_intervals(starts, window_blocks), False: window_intervals(starts, window_blocks // 2)}
        rows = rows_of(columns_as_rows(self.head) if c.tied else self.embedding, inputs, self.dtype)
        # Without the barrier an evaluation normalises the rows again, in float32, in every layer.
        x0 = jax.lax.optimization_barrier(norm(rows))
        heads = (*inputs.shape, c.num_heads, c.head_dim)
        values = tuple(rows_of(table, inputs, self.dtype).reshape(heads) for table in self.value_tables)
        slots = slots_of(starts, window_blocks, c.head_dim) if c.paired_heads else None
        rotary = rotary_tables(inputs.shape[1], c.head_dim)
        context = Context(x0, None, values, rotary, windows, slots)
        return norm(self.trunk(context, visits)).astype(self.dtype)
