"""Lanes: several residual streams side by side, of which a reader takes a mixture and to which it writes. Readers are
visits of the loop (between.py) or, as follows, applications of layers: hyper-connections (arXiv 2409.19606).

All lanes L_i are the embedding at first. A layer reads u = sum_i read[i] L_i, makes y of it, which holds its own
residual sum, and leaves L_i <- sum_j kept[i,j] L_j + written[i] (y - u); the head reads the sum of the lanes.

By token, with o_j = tanh(norm(L_j) generator), n + 2 numbers for each lane: read[j], written[j] and kept[:,j] have
scale[0] o_j[0], scale[1] o_j[1] and scale[2] o_j[2:] added to them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.model.elementwise import norm, weighted_sum

Lanes = tuple[Float[Array, "B T D"], ...]  # float32
INITIAL_SCALE = 0.01  # of what tokens add, whose generator is zero at the start; from the paper


class LaneWeights(NamedTuple):
    """Of one reader, a visit or an application of a layer, or with leading axes of several. Float32."""

    read: Float[Array, "*S n"]
    kept: Float[Array, "*S n n"]
    written: Float[Array, "*S n"]


def lane_weights(module: nn.Module, readers: int, lanes: int) -> LaneWeights:
    """Parameters lane_read, lane_kept and lane_written of `module`. At the start readers read the lanes in turn, keep
    them all, and write to all."""
    in_turn = jnp.eye(lanes)[jnp.arange(readers) % lanes]
    return LaneWeights(
        module.param("lane_read", lambda key: in_turn),
        module.param("lane_kept", lambda key: jnp.tile(jnp.eye(lanes), (readers, 1, 1))),
        module.param("lane_written", nn.initializers.ones, (readers, lanes)),
    )


class LayerLanes(NamedTuple):
    """Of one application of a layer, or with a leading axis of several. Float32."""

    weights: LaneWeights
    generator: Float[Array, "*S D n+2"] | None = None
    scale: Float[Array, "*S 3"] | None = None

    def of(self, lanes: Lanes, dtype: jnp.dtype) -> LaneWeights:
        """The weights for these lanes: numbers, or by token [B, T, 1] behind the axes of lanes. The generator's product
        is made in `dtype`."""
        if self.generator is None:
            return self.weights
        generator = self.generator.astype(dtype)
        by_lane = [jnp.tanh((norm(x).astype(dtype) @ generator).astype(jnp.float32)) for x in lanes]
        o_nMBT1 = jnp.moveaxis(jnp.stack(by_lane), -1, 1)[..., None]
        of_read, of_written, of_kept = o_nMBT1[:, 0], o_nMBT1[:, 1], jnp.swapaxes(o_nMBT1[:, 2:], 0, 1)
        static, scale = self.weights, self.scale
        return LaneWeights(
            static.read[:, None, None, None] + scale[0] * of_read,
            static.kept[:, :, None, None, None] + scale[2] * of_kept,
            static.written[:, None, None, None] + scale[1] * of_written,
        )


def layer_lanes(module: nn.Module, applications: int, lanes: int, by_token: int | None) -> LayerLanes:
    """Parameters of `module`: those of `lane_weights` and, for tokens of `by_token` channels, lane_generator
    [applications, D, n + 2], zero, and lane_scale [applications, 3]."""
    weights = lane_weights(module, applications, lanes)
    if by_token is None:
        return LayerLanes(weights)
    generator = module.param("lane_generator", nn.initializers.zeros, (applications, by_token, lanes + 2))
    scale = module.param("lane_scale", nn.initializers.constant(INITIAL_SCALE), (applications, 3))
    return LayerLanes(weights, generator, scale)


def read_lanes(lanes: Lanes, weights: LaneWeights, dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """What a reader takes, in `dtype`."""
    return weighted_sum(*zip(weights.read, lanes, strict=True), dtype=dtype)


def write_lanes(lanes: Lanes, added: Float[Array, "B T D"], weights: LaneWeights) -> Lanes:
    """The lanes after a reader that adds `added` to them."""
    return tuple(
        weighted_sum(*zip(weights.kept[i], lanes, strict=True), (weights.written[i], added), dtype=jnp.float32)
        for i in range(len(lanes))
    )
