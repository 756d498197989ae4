"""Skip connections over depth: with N applications, the output of number i < N/2 is added back before number N-1-i.

The first half of the loop's visits emits its outputs and the second half consumes them in reverse, so the loop is two
scans over one set of weights.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.model.config import ModelConfig
from senano_jax.model.context import Context
from senano_jax.model.layer import Layer
from senano_jax.model.norm_fork import norm_fork
from senano_jax.model.remat import rematerialised
from senano_jax.model.stream_mix import MixWeights, is_fused, stream_mix


class UNetLayer(Layer):
    """A layer that first mixes the stream with a skip connection and the embedding."""

    def setup(self):
        super().setup()
        self.lambdas = self.param("lambdas", lambda key: jnp.array([1.0, 0.0]))

    def mixed(self, x_BTD, skip, x0_BTD):
        """The stream, rounded once after the weighted sum, and its norm. `skip` is None or (weight, output of an
        earlier application)."""
        lambdas = self.lambdas
        skip_weight, skip_BTD = (None, None) if skip is None else (lambdas[0] * skip[0], skip[1])
        return stream_mix(x_BTD, skip_BTD, x0_BTD, MixWeights(lambdas[0], skip_weight, lambdas[1]))

    def __call__(self, x_BTD, skip, context: Context, visit=0):
        """Applies the layer; returns the new residual stream and the values of its attention, None without one.

        `x_BTD` may be of either type. The stream comes back in float32, its sum with the outputs of attention and MLP
        not rounded; callers round what they store.
        """
        x_BTD, normed_BTD = self.mixed(x_BTD, skip, context.x0)
        v_BTHK = None
        if self.has_attention:
            y_BTD, v_BTHK = self.attend(normed_BTD, context, visit)
            # In the second half its gradient comes from the next layer's stream_mix alone, which rounded it, or, at the
            # end, from the last norm.
            rounded = skip is not None and is_fused(x_BTD.shape)
            x_BTD, normed_BTD = norm_fork(x_BTD, y_BTD, rounded_gradient=rounded)
        mlp_BTD = self.mlp(normed_BTD)
        return x_BTD.astype(jnp.float32) + mlp_BTD.astype(jnp.float32), v_BTHK


def apply_layer(layer: UNetLayer, x: Float[Array, "B T D"], skip, context: Context, visit=0):
    """One application of a layer; with rematerialisation its input is rounded to the type of the activations first."""
    if layer.config.remat != "none":  # the layer's input is kept
        x = x.astype(context.x0.dtype)
    return layer(x, skip, context, visit)


class LoopVisit(nn.Module):
    """One visit of all layers of the loop."""

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        layer_class = rematerialised(UNetLayer, c.remat, scanned=not c.unroll)
        for layer in range(layers.prelude, layers.prelude + layers.loop):
            setattr(self, f"layer_{layer}", layer_class(c, layer))

    def __call__(self, x: Float[Array, "B T D"], of_visit, context: Context):
        """`of_visit` is (skips, number of the visit).

        `skips` is None in the first half of the visits, and the layers' outputs are returned, rounded, beside x. In the
        second half it is (weights [loop], one [B, T, D] a layer), to be added before each layer.
        """
        layers = self.config.layers
        skips, visit = of_visit
        outputs = []
        for j, layer in enumerate(range(layers.prelude, layers.prelude + layers.loop)):
            skip = None if skips is None else (skips[0][j], skips[1][j])
            x, _ = apply_layer(getattr(self, f"layer_{layer}"), x, skip, context, visit)
            outputs.append(x.astype(context.x0.dtype))
        return x, tuple(outputs) if skips is None else None


class UNetTrunk(nn.Module):
    """Parameters, float32: skip_weights [N/2], and the layers."""

    config: ModelConfig

    def setup(self):
        c, layers = self.config, self.config.layers
        self.skip_weights = self.param("skip_weights", nn.initializers.ones, (c.trunk.skips(layers),))
        layer_class = rematerialised(UNetLayer, c.remat)
        outer = (*range(layers.prelude), *range(layers.prelude + layers.loop, layers.layers))
        for layer in outer:
            setattr(self, f"layer_{layer}", layer_class(c, layer))
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

    def __call__(self, context: Context, visits: int | None = None) -> Float[Array, "B T D"]:
        """Raises ValueError for other `visits` than the configuration's: the skip connections depend on them."""
        c, layers = self.config, self.config.layers
        if visits not in (None, layers.visits):
            raise ValueError(f"skip connections pair {layers.visits} visits of the loop, not {visits}")
        x, outputs = context.x0, []
        for layer in range(layers.prelude):
            x, v = apply_layer(getattr(self, f"layer_{layer}"), x, None, context)
            if layer == 0 and not c.value_embeddings:
                context = context._replace(first_v=v)
            outputs.append(x.astype(context.x0.dtype))

        loop_skips = layers.loop * layers.visits // 2
        loop_weights, coda_weights = self.skip_weights[:loop_skips], self.skip_weights[loop_skips:]
        if layers.loop:
            numbers = jnp.arange(layers.visits).reshape(2, -1) if c.has_parameters_by_visit else (None, None)
            x, emitted = self.loop(x, (None, numbers[0]), context)
            mirrored = tuple(outputs[::-1] for outputs in reversed(emitted))
            x, _ = self.loop(x, ((loop_weights.reshape(-1, layers.loop), mirrored), numbers[1]), context)

        for j, layer in enumerate(range(layers.prelude + layers.loop, layers.layers)):
            skip = (coda_weights[j], outputs.pop())
            x, _ = apply_layer(getattr(self, f"layer_{layer}"), x, skip, context)
        return x
