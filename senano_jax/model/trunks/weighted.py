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
from senano_jax.model.trunks.between import Carried, begin, enter, finish, leave
from senano_jax.model.trunks.exits import Exits
from senano_jax.model.trunks.lanes import (
    Lanes,
    LaneWeights,
    LayerLanes,
    lane_weights,
    layer_lanes,
    read_lanes,
    write_lanes,
)


class Weights(NamedTuple):
    """Of one application, or with leading axes of several; pairs are of attention and MLP. Float32."""

    stream: Float[Array, "*S 2"]
    added: Float[Array, "*S 2"]
    x0: Float[Array, "*S"]
    lanes: LayerLanes | None = None


class WeightedLayer(Layer):
    """x <- stream_0 x + added_0 attention(norm x) + x0 x_0, then x <- stream_1 x + added_1 mlp(norm x)."""

    def __call__(self, x_BTD, weights: Weights, context: Context, visit: Int[Array, ""] | int, read_BTD=None):
        """Returns the new residual stream, float32 and not rounded, and the values of the attention, None without one.

        Without attention its term is missing. What attention adds is not rounded into the stream. Attention reads the
        normalised stream or, if it is given, `read_BTD`.
        """
        v_BTHK, y_BTD = None, None
        if self.has_attention:
            first = ()
            if read_BTD is None:
                x_BTD, read_BTD, *first = norm_fork(x_BTD, apart=self.reads_apart)
            y_BTD, v_BTHK = self.attend(read_BTD, context, visit, weights.added[0], *first)
        of_sums = StreamWeights(weights.stream[0], weights.x0, weights.stream[1])
        with jax.named_scope("mlp"):  # Flax's own name is mlp.matrices, which profiles do not know
            matrices = self.mlp.matrices(context.x0.dtype, weights.added[1])
        return stream_mlp(x_BTD, context.x0, y_BTD, of_sums, *matrices), v_BTHK


Stream = Float[Array, "B T D"] | Lanes


def apply_layer(layer: WeightedLayer, x: Stream, weights: Weights, context: Context, visit, read=None):
    """The layer on a rounded stream: what `remat` keeps is its input. The stream may be lanes."""
    if weights.lanes is None:
        return layer(x.astype(context.x0.dtype), weights, context, visit, read)
    of_lanes = weights.lanes.of(x, context.x0.dtype)
    read_BTD = read_lanes(x, of_lanes, context.x0.dtype)
    y_BTD, v_BTHK = layer(read_BTD, weights._replace(lanes=None), context, visit)
    return write_lanes(x, y_BTD - read_BTD.astype(jnp.float32), of_lanes), v_BTHK


class LoopVisit(nn.Module):
    """One visit of all layers of the loop."""

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        layer_class = rematerialised(WeightedLayer, c.remat, scanned=not c.unroll)
        for layer in range(layers.prelude, layers.prelude + layers.loop):
            setattr(self, f"layer_{layer}", layer_class(c, layer))

    def __call__(
        self,
        carried: Carried,
        of_visit: tuple[Weights, LaneWeights | None, Int[Array, ""]],
        context: Context,
    ):
        """`of_visit` is the weights, with a leading axis of the loop's layers, those of the lanes, if there are any,
        and the number of the visit.

        Returns what the next visit is given and, if later layers read it, the residual stream, rounded.
        """
        layers, between, dtype = self.config.layers, self.config.trunk.between, context.x0.dtype
        weights, of_lanes, visit = of_visit
        x = enter(between, carried, of_lanes)
        for j, layer in enumerate(range(layers.prelude, layers.prelude + layers.loop)):
            x, _ = apply_layer(getattr(self, f"layer_{layer}"), x, _at(weights, j), context, visit)
        return leave(between, carried, x, of_lanes, dtype), x.astype(dtype) if self.config.trunk.exits else None


class WeightedTrunk(nn.Module):
    """Parameters, float32, by application: stream_weights [N, 2], added_weights [N, 2], x0_weights [N]; where the
    configuration asks for it, by visit or by application lane_read, lane_kept and lane_written, by application
    lane_generator and lane_scale, and exits_to_coda and exits_to_head; the layers.

    Attention and MLP of one application have the two columns.
    """

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        N = layers.positions
        stream = nn.initializers.constant(c.trunk.growth ** (1 / (2 * N)))
        self.stream_weights = self.param("stream_weights", stream, (N, 2))
        self.added_weights = self.param("added_weights", lambda key: initial_added_weights(layers))
        self.x0_weights = self.param("x0_weights", nn.initializers.zeros, (N,))
        self.of_layer_lanes = None
        if c.trunk.between == "layer-lanes":
            self.of_layer_lanes = layer_lanes(self, N, c.trunk.lanes, c.dim if c.trunk.lanes_by_token else None)
        layer_class = rematerialised(WeightedLayer, c.remat)
        for layer in (*range(layers.prelude), *range(layers.prelude + layers.loop, layers.layers)):
            setattr(self, f"layer_{layer}", layer_class(c, layer))
        if layers.loop:
            self.loop = LoopVisit(c)
            self.of_lanes = lane_weights(self, layers.visits, c.trunk.lanes) if c.trunk.between == "lanes" else None
        if c.trunk.exits:
            # Sources: the embedding, what entered the loop, and what left the visits but, for the coda, the last one.
            self.exits_to_coda = Exits((0.0,) * (layers.visits + 1))
            self.exits_to_head = Exits((*(0.0,) * layers.visits, -c.trunk.backout, 0.0))

    def __call__(self, context: Context, visits: int | None = None) -> Float[Array, "B T D"]:
        """The first `visits` visits of the loop, by default all. Raises ValueError for more than there are."""
        c, layers = self.config, self.config.layers
        visits = layers.visits if visits is None else visits
        if layers.loop and not 1 <= visits <= layers.visits:
            raise ValueError(f"the loop has weights for 1 to {layers.visits} visits, not for {visits}")
        weights = Weights(self.stream_weights, self.added_weights, self.x0_weights, self.of_layer_lanes)
        x = context.x0.astype(jnp.float32)
        if self.of_layer_lanes is not None:
            x = (x,) * c.trunk.lanes
        for layer in range(layers.prelude):
            x, v = apply_layer(getattr(self, f"layer_{layer}"), x, _at(weights, layer), context, 0)
            if layer == 0 and not c.value_embeddings:
                context = context._replace(first_v=v)
        read, sources = None, []
        if layers.loop:
            if c.trunk.exits:
                sources = [context.x0, x.astype(context.x0.dtype)]
            x, exits = self._loop(x, weights, context, visits)
        if c.trunk.exits:
            sources += [exits[n] for n in range(visits)]
            x = self.exits_to_coda(x.astype(context.x0.dtype), sources[:-1])
        if c.trunk.coda_reads_exit:
            x, read = norm_fork(x.astype(context.x0.dtype))
        for layer in range(layers.prelude + layers.loop, layers.layers):
            x, _ = apply_layer(
                getattr(self, f"layer_{layer}"), x, _at(weights, layer - layers.layers), context, 0, read
            )
        if self.of_layer_lanes is not None:
            x = sum(x)
        return self.exits_to_head(x.astype(context.x0.dtype), sources) if c.trunk.exits else x

    def _loop(self, x, weights: Weights, context: Context, visits: int):
        """The stream after the loop and, if later layers read them, those after all visits."""
        c, layers = self.config, self.config.layers
        end = layers.prelude + layers.loop * visits
        of_loop = jax.tree.map(lambda w: w[layers.prelude : end].reshape(visits, layers.loop, *w.shape[1:]), weights)
        scan = nn.scan(
            lambda loop, carried, of_visit: loop(carried, of_visit, context),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=visits,
            unroll=visits if c.unroll else 1,
        )
        of_visits = jax.tree.map(lambda w: w[:visits], (self.of_lanes, jnp.arange(layers.visits)))
        between = c.trunk.between
        carried, exits = scan(self.loop, begin(between, x, c.trunk.lanes), (of_loop, *of_visits))
        return finish(between, carried), exits


def initial_added_weights(layers: LayerSchedule) -> Float[Array, "N 2"]:
    """1, and visits^(-1/2) in the loop."""
    of_application = jnp.array([layers.visits_of(layer) ** -0.5 for layer in layers.order], jnp.float32)
    return jnp.broadcast_to(of_application[:, None], (layers.positions, 2))


def _at(weights: Weights, index: int) -> Weights:
    return jax.tree.map(lambda w: w[index], weights)
