"""Several residual streams, which go through all layers side by side: hyper-connections (arXiv 2409.19606) with static
weights by application of a layer.

All lanes L_i are the embedding at first. A layer reads u = sum_i read[i] L_i, makes y of it, which holds its own
residual sum, and leaves L_i <- sum_j kept[i,j] L_j + written[i] (y - u); the head reads the sum of the lanes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.model.elementwise import weighted_sum
from senano_jax.model.trunks.between import LaneWeights

Lanes = tuple[Float[Array, "B T D"], ...]  # float32


def read(lanes: Lanes, weights: LaneWeights, dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """What a layer reads, in `dtype`."""
    return weighted_sum(*zip(weights.read, lanes, strict=True), dtype=dtype)


def written(lanes: Lanes, added: Float[Array, "B T D"], weights: LaneWeights) -> Lanes:
    """The lanes after a layer that added `added` to what it read."""
    return tuple(
        weighted_sum(*zip(weights.kept[i], lanes, strict=True), (weights.written[i], added), dtype=jnp.float32)
        for i in range(len(lanes))
    )
