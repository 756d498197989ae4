"""Layers that choose what they read from what was made before: Block Attention Residuals (Kimi team, arXiv 2603.15031).

A block is some layers of one visit of the loop, or all before it, or all after it, and is the sum of what they added.
An application reads the embedding, the blocks before its own and what its own has added so far, each with a weight that
it computes of that (depth_attention.py), and the head reads so, too. While queries are zero, as at the start, the
weights are 1, and what is read is the residual stream of trunks/weighted.py.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from senano_jax.model.context import Context
from senano_jax.model.depth_attention import attend_depth
from senano_jax.model.trunks.weighted import LoopVisit, WeightedLayer, WeightedTrunk, Weights


class Depth(NamedTuple):
    """What was made so far, in the type of the activations."""

    blocks: Float[Array, "S B T D"]
    """The embedding and the blocks that are complete; zeros behind them."""
    count: Int[Array, ""]
    """How many of `blocks` there are."""
    own: Float[Array, "B T D"] | None = None
    """What the block that is not complete has added, None where its first layer comes next."""

    def read(self, query_D) -> tuple[Float[Array, "B T D"], "Depth"]:
        """What a reader with this query takes, and the same again, for those after it."""
        read_BTD, blocks = attend_depth(self.blocks, self.own, query_D, self.count)
        return read_BTD, self._replace(blocks=blocks)

    def complete(self) -> "Depth":
        """With its block among the others."""
        blocks = lax.dynamic_update_index_in_dim(self.blocks, self.own, self.count, 0)
        return Depth(blocks, self.count + 1)


def apply_layer(layer: WeightedLayer, depth: Depth, query_D, weights: Weights, context: Context, visit):
    """The layer on what it reads; what it adds to that belongs to its block. Returns what was made, and the values."""
    read_BTD, depth = depth.read(query_D)
    x_BTD, v_BTHK = layer(read_BTD, weights, context, visit)
    own_BTD = x_BTD - read_BTD.astype(jnp.float32)
    if depth.own is not None:
        own_BTD += depth.own.astype(jnp.float32)
    return depth._replace(own=own_BTD.astype(read_BTD.dtype)), v_BTHK


class DepthVisit(LoopVisit):
    """One visit of all layers of the loop."""

    def __call__(self, depth: Depth, weights: Weights, queries, visit: Int[Array, ""], context: Context):
        """What was made before and in this visit, all of it complete. Weights and queries have an axis of the loop's
        layers."""
        for j, layer in enumerate(self.layers()):
            depth, _ = apply_layer(layer, depth, queries[j], weights.at(j), context, visit)
            if (j + 1) % self.config.trunk.depth_block == 0:
                depth = depth.complete()
        return depth


class DepthTrunk(WeightedTrunk):
    """Parameters beside those of its class: depth_queries [N + 1, D], float32, by application and, the last, the
    head's."""

    visit_class = DepthVisit

    def setup(self):
        super().setup()
        readers = self.config.layers.positions + 1
        self.depth_queries = self.param("depth_queries", nn.initializers.zeros, (readers, self.config.dim))

    def __call__(self, context: Context, visits: int | None = None) -> Float[Array, "B T D"]:
        """The first `visits` visits of the loop, by default all. Raises ValueError for more than there are."""
        c, layers = self.config, self.config.layers
        visits, weights = self.checked(visits), self.weights()
        queries, of_head = self.depth_queries[:-1], self.depth_queries[-1]
        blocks = c.trunk.complete_blocks(layers, visits)
        later = jnp.zeros((blocks - 1, *context.x0.shape), context.x0.dtype)
        depth = Depth(jnp.concatenate([context.x0[None], later]), jnp.int32(1))
        for layer in range(layers.prelude):
            applied = getattr(self, f"layer_{layer}")
            depth, v = apply_layer(applied, depth, queries[layer], weights.at(layer), context, 0)
            if layer == 0 and not c.value_embeddings:
                context = context._replace(first_v=v)
        depth = self.visited(depth.complete(), (weights, queries), context, visits)
        for layer in range(layers.prelude + layers.loop, layers.layers):
            applied, at = getattr(self, f"layer_{layer}"), layer - layers.layers
            depth, _ = apply_layer(applied, depth, queries[at], weights.at(at), context, 0)
        return depth.read(of_head)[0]
