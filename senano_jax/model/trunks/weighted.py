"""A residual stream without skip connections whose weights differ from application to application.

Stored layers are shared by the visits of the loop; how much of the stream stays, and how much of each sublayer and of
the embedding is added, is not (modded-nanogpt's weights by layer, here by application; sublayers of the loop begin with
visits^(-1/2), as their shared matrices move all visits at once).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from senano_jax.model.config import ModelConfig
from senano_jax.model.context import Context
from senano_jax.model.layer import Layer
from senano_jax.model.norm_fork import norm_fork
from senano_jax.model.remat import rematerialised
from senano_jax.model.schedule import LayerSchedule
from senano_jax.model.stream_mlp import StreamWeights, stream_mlp


class Weights(NamedTuple):
    """Of one application, or with leading axes of several; pairs are of attention and MLP. Float32."""

    stream: Float[Array, "*S 2"]
    added: Float[Array, "*S 2"]
    x0: Float[Array, "*S"]

    def at(self, index) -> "Weights":
        """Those of one application, or layer of a visit."""
        return jax.tree.map(lambda w: w[index], self)


class WeightedLayer(Layer):
    """x <- stream_0 x + added_0 attention(norm x) + x0 x_0, then x <- stream_1 x + added_1 mlp(norm x)."""

    def __call__(self, x_BTD, weights: Weights, context: Context, visit: Int[Array, ""] | int):
        """Returns the new residual stream, float32 and not rounded, and the values of the attention, None without one.

        `x_BTD` is rounded by those who call: what `remat` keeps is the layer's input. Without attention its term is
        missing. What attention adds is not rounded into the stream.
        """
        v_BTHK, y_BTD = None, None
        if self.has_attention:
            x_BTD, read_BTD, *first = norm_fork(x_BTD, apart=self.reads_apart)
            y_BTD, v_BTHK = self.attend(read_BTD, context, visit, weights.added[0], *first)
        of_sums = StreamWeights(weights.stream[0], weights.x0, weights.stream[1])
        with jax.named_scope("mlp"):  # Flax's own name is mlp.matrices, which profiles do not know
            matrices = self.mlp.matrices(context.x0.dtype, weights.added[1])
        return stream_mlp(x_BTD, context.x0, y_BTD, of_sums, *matrices), v_BTHK


class LoopVisit(nn.Module):
    """One visit of all layers of the loop."""

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        layer_class = rematerialised(WeightedLayer, c.remat, scanned=not c.unroll)
        for layer in range(layers.prelude, layers.prelude + layers.loop):
            setattr(self, f"layer_{layer}", layer_class(c, layer))

    def layers(self) -> list[WeightedLayer]:
        """In order."""
        first = self.config.layers.prelude
        return [getattr(self, f"layer_{first + j}") for j in range(self.config.layers.loop)]

    def __call__(self, x_BTD, weights: Weights, visit: Int[Array, ""], context: Context):
        """The residual stream that the next visit is given, float32. The weights have an axis of the loop's layers."""
        for j, layer in enumerate(self.layers()):
            x_BTD, _ = layer(x_BTD.astype(context.x0.dtype), weights.at(j), context, visit)
        return x_BTD


class WeightedTrunk(nn.Module):
    """Parameters, float32, by application: stream_weights [N, 2], added_weights [N, 2], x0_weights [N]; the layers.

    Attention and MLP of one application have the two columns.
    """

    config: ModelConfig
    visit_class = LoopVisit

    def setup(self):
        c, layers = self.config, self.config.layers
        N = layers.positions
        stream = nn.initializers.constant(c.trunk.growth ** (1 / (2 * N)))
        self.stream_weights = self.param("stream_weights", stream, (N, 2))
        self.added_weights = self.param("added_weights", lambda key: initial_added_weights(layers))
        self.x0_weights = self.param("x0_weights", nn.initializers.zeros, (N,))
        layer_class = rematerialised(WeightedLayer, c.remat)
        for layer in (*range(layers.prelude), *range(layers.prelude + layers.loop, layers.layers)):
            setattr(self, f"layer_{layer}", layer_class(c, layer))
        if layers.loop:
            self.loop = self.visit_class(c)

    def __call__(self, context: Context, visits: int | None = None) -> Float[Array, "B T D"]:
        """The first `visits` visits of the loop, by default all. Raises ValueError for more than there are."""
        c, layers, dtype = self.config, self.config.layers, context.x0.dtype
        visits, weights, x = self.checked(visits), self.weights(), context.x0.astype(jnp.float32)
        for layer in range(layers.prelude):
            x, v = getattr(self, f"layer_{layer}")(x.astype(dtype), weights.at(layer), context, 0)
            if layer == 0 and not c.value_embeddings:
                context = context._replace(first_v=v)
        if layers.loop:
            x = self.visited(x, (weights,), context, visits)
        for layer in range(layers.prelude + layers.loop, layers.layers):
            x, _ = getattr(self, f"layer_{layer}")(x.astype(dtype), weights.at(layer - layers.layers), context, 0)
        return x

    def weights(self) -> Weights:
        """Of all applications."""
        return Weights(self.stream_weights, self.added_weights, self.x0_weights)

    def checked(self, visits: int | None) -> int:
        """How many there are to be."""
        layers = self.config.layers
        visits = layers.visits if visits is None else visits
        if layers.loop and not 1 <= visits <= layers.visits:
            raise ValueError(f"the loop has weights for 1 to {layers.visits} visits, not for {visits}")
        return visits

    def visited(self, carried, of_applications: tuple, context: Context, visits: int):
        """What the visits of the loop make of what the first is given. Each gets its part of `of_applications`, whose
        arrays have an axis of all applications."""
        c, layers = self.config, self.config.layers
        end = layers.prelude + layers.loop * visits
        by_visit = jax.tree.map(
            lambda w: w[layers.prelude : end].reshape(visits, layers.loop, *w.shape[1:]), of_applications
        )
        scan = nn.scan(
            lambda loop, carried, of_visit: (loop(carried, *of_visit, context), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=visits,
            unroll=visits if c.unroll else 1,
        )
        carried, _ = scan(self.loop, carried, (*by_visit, jnp.arange(visits)))
        return carried


def initial_added_weights(layers: LayerSchedule) -> Float[Array, "N 2"]:
    """1, and visits^(-1/2) in the loop."""
    of_application = jnp.array([layers.visits_of(layer) ** -0.5 for layer in layers.order], jnp.float32)
    return jnp.broadcast_to(of_application[:, None], (layers.positions, 2))
