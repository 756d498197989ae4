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
from senano_jax.model.pieces.input_correction import InputCorrection
from senano_jax.model.pieces.paired_heads import slots_of
from senano_jax.model.pieces.smear import Smear
from senano_jax.model.rotary import rotary_tables
from senano_jax.model.targets import Prefixes, targets_of
from senano_jax.model.trunks import trunk_of

TIED_DEVIATION = 0.005  # of a table that is both embedding and head, at the start; from modded-nanogpt


class Gpt(nn.Module):
    """Parameters: embedding [vocab, dim], unless it is the head, and value_embedding_<i> [vocab, heads_dim] in `dtype`;
    head [dim, padded vocab], logit_bias [padded vocab] if there is one, x0_values_<layer> [dim, heads_dim], those of
    smear, of the input's correction and of the trunk, in float32.

    Profiles tell the parts of a step by the names of `features` and of the layers' scopes (profiling/hlo.py).
    """

    config: ModelConfig
    dtype: jnp.dtype  # of activations and embedding

    def setup(self):
        c = self.config
        self.embedding = None if c.tied else self._table("embedding", c.dim)
        self.value_tables = [self._table(f"value_embedding_{n}", c.heads_dim) for n in range(c.value_embeddings)]
        zeros, small = nn.initializers.zeros, nn.initializers.normal(TIED_DEVIATION)
        self.head = self.param("head", small if c.tied else zeros, (c.dim, c.padded_vocab_size))
        self.smear = Smear() if c.smear else None
        self.trunk = trunk_of(c)
        nn.share_scope(self, self.trunk)
        # Drawn last: a parameter's initial weights depend on how many were drawn before it.
        self.logit_bias = self.param("logit_bias", zeros, (c.padded_vocab_size,)) if c.logit_bias else None
        self.input_correction = None
        if c.input_rank:
            self.input_correction = InputCorrection(c.vocab_size, c.input_rank)
            nn.share_scope(self, self.input_correction)
        self.x0_matrices = [self.param(f"x0_values_{layer}", zeros, (c.dim, c.heads_dim)) for layer in c.values_from_x0]

    def _table(self, name: str, width: int) -> Float[Array, "vocab width"]:
        def init(key):
            return jax.random.normal(key, (self.config.vocab_size, width)).astype(self.dtype)

        return self.param(name, init)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        window_blocks: Int[Array, ""] | int,
        *,
        loss_weights: Float[Array, "K"] | None = None,
        prefixes: Prefixes | None = None,
        visits: int | None = None,
    ) -> Float[Array, ""]:
        """Cross-entropy summed over all tokens, float32.

        `window_blocks` is the long window in blocks of 128. `loss_weights` weigh the prediction of the token 1, 2, .. K
        ahead; None: of the next one alone. `prefixes` add that of what the next one begins with. `visits` of the loop,
        None: as configured.
        """
        asked = targets_of(targets.astype(jnp.int32), loss_weights, prefixes)
        features = self.features(inputs, window_blocks, visits)
        return cross_entropy(features, self.head, asked, self.config.cap, self.logit_bias)

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
        z = x @ self.head.astype(x.dtype)
        if self.logit_bias is not None:
            z = z.astype(jnp.float32) + self.logit_bias
        return capped(self.config.cap, self.config.dim).logits(z)

    def features(
        self, inputs: Int[Array, "B T"], window_blocks: Int[Array, ""] | int, visits: int | None = None
    ) -> Float[Array, "B T D"]:
        """Normalised residual stream that the head reads."""
        c = self.config
        inputs = inputs.astype(jnp.int32)
        starts = document_start(inputs)
        windows = {True: window_intervals(starts, window_blocks), False: window_intervals(starts, window_blocks // 2)}
        rows = rows_of(columns_as_rows(self.head) if c.tied else self.embedding, inputs, self.dtype)
        if self.input_correction is not None:
            rows = self.input_correction(rows, inputs)
        x0 = norm(rows if self.smear is None else self.smear(rows))
        x0 = jax.lax.optimization_barrier(x0)  # or an evaluation normalises the rows again, in float32, in every layer
        heads = (*inputs.shape, c.num_heads, c.head_dim)
        values = tuple(rows_of(table, inputs, self.dtype).reshape(heads) for table in self.value_tables)
        slots = slots_of(starts, window_blocks, c.head_dim) if c.paired_heads else None
        rotary = rotary_tables(inputs.shape[1], c.head_dim)
        x0_values = tuple((x0 @ matrix.astype(self.dtype)).reshape(heads) for matrix in self.x0_matrices)
        context = Context(x0, None, values, rotary, windows, slots, x0_values)
        return norm(self.trunk(context, visits)).astype(self.dtype)
