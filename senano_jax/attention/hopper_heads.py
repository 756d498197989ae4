"""What the backward kernels for Hopper GPUs are told of the product that queries, keys and values were made of
(model/heads.py), to give its gradient in place of theirs, which then never reach memory.

The product is [B, T, 3*H, K] here: the heads of queries, those of keys and those of values.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from senano_jax.attention.hopper_tiles import ROW, SCORES, along_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """How queries or keys were made: y = rotate(scale x), with the scale of x's own norm. Float32."""

    scale: Float[Array, "B H T"]
    cos: Float[Array, "T 1 half"]
    sin: Float[Array, "T 1 half"]
    turning: int = field(metadata={"static": True})  # pairs (j, half + j): the first ones; the others are not turned


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixed:
    """How values were made: (1 - first_share) own + first_share first_v."""

    own: Float[Array, "B T H K"]
    first_v: Float[Array, "B T H K"]
    first_share: Float[Array, "1"]


def pulled_back(dy_RD, y_RD, turned: Turned, sequence, head, rows, factor: float):
    """`factor` times the gradient of x for `rows`, from dy, that of y: tiles [64, K] in registers, float32 but y.

    `turned` is in global memory. With the norm's scale s and z = s x the gradient is s (dz - mean(z dz) z), where z and
    dz are y and dy turned back. A rotation keeps inner products, so mean(z dz) is mean(y dy), and instead of both their
    difference is turned back.
    """
    width, turning = y_RD.shape[1], turned.turning
    scale_R = plgpu.load(turned.scale.at[sequence, head, rows], layout=ROW, optimized=False)
    cos_RE, sin_RE = (
        plgpu.load(table.at[rows, 0, pl.ds(0, turning)], layout=SCORES, optimized=False)
        for table in (turned.cos, turned.sin)
    )
    y_RD = y_RD.astype(jnp.float32)
    along_R = jnp.sum(y_RD * dy_RD, axis=1) * (1 / width)
    d_RD = (dy_RD - along_rows(along_R, width) * y_RD) * along_rows(scale_R * factor, width)
    half = width // 2
    d1_RE, d2_RE = d_RD[:, :turning], d_RD[:, half : half + turning]
    x1_RE, x2_RE = d1_RE * cos_RE - d2_RE * sin_RE, d2_RE * cos_RE + d1_RE * sin_RE
    return jnp.concatenate([x1_RE, d_RD[:, turning:half], x2_RE, d_RD[:, half + turning :]], axis=1)
