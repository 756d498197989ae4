"""Log-sum-exp of soft-capped logits from the product that they are made of, for Hopper GPUs: no logit is ever stored.

For an evaluation, which needs no gradient: without it the logits of 8,192 tokens, 0.8 GB, are written once and read
once. A warpgroup has a tile of the product in registers, float32, and adds up the exponentials along its rows while
the other warpgroup multiplies. Only these sums are stored, one for each row and tile.

Names end in their dimensions: N tokens, D the width, V logits, R the rows that are worked on at a time, C their
columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from senano_jax.attention.hopper_tiles import ROWS
from senano_jax.kernels import hopper_matmul, hopper_pipeline
from senano_jax.kernels.hopper_pipeline import Part
from senano_jax.kernels.hopper_tile import SWIZZLED, Tile

TILE = Tile(shared="b", piece=64)
LOG2_E = math.log2(math.e)


def fits(tokens: int, depth: int, logits: int, dtype) -> bool:
    """Whether the kernel runs here, and takes [tokens, depth] x [depth, logits] of this dtype."""
    return hopper_matmul.runs_here() and dtype == jnp.bfloat16 and TILE.divides(tokens, depth, logits)


@functools.partial(jax.jit, static_argnames=("cap", "slope", "shift", "tile"))
def logsumexp(
    x_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    *,
    cap: float,
    slope: float,
    shift: float = 0.0,
    tile: Tile = TILE,
) -> Float[Array, "N"]:
    """log(sum(exp(cap * sigmoid(slope * (z + shift))))) along the rows of z = x head, which is rounded to bfloat16;
    float32.

    Raises ValueError for sizes that the tile does not divide, and for other operands than bfloat16.
    """
    (tokens, depth), logits = x_ND.shape, head_DV.shape[1]
    if x_ND.dtype != jnp.bfloat16 or not tile.divides(tokens, depth, logits):
        raise ValueError(f"no kernel for logits of {x_ND.shape} and {head_DV.shape} in {x_ND.dtype}")
    sums = hopper_pipeline.call(
        functools.partial(_finish, cap=cap, slope=slope, shift=shift, tile=tile),
        x_ND,
        head_DV,
        tile=tile,
        out_type=jax.ShapeDtypeStruct((logits // tile.columns, tokens), jnp.float32),
        name="logsumexp_matmul",  # profiles count it among the products
    )
    return jnp.log(sums.sum(0))


def _finish(part: Part, sums_gmem, *, cap: float, slope: float, shift: float, tile: Tile):
    acc = part.multiply()
    row, column = part.place()

    def sum_of_exponentials(r, c):
        z_RC = acc[r : r + ROWS, c : c + SWIZZLED].astype(part.smem.dtype).astype(jnp.float32)
        root_RC = lax.rsqrt(1 + jnp.exp2(z_RC * (-slope * LOG2_E) - shift * slope * LOG2_E))
        sigmoid_RC = root_RC * root_RC  # an approximate root takes one instruction, a division ten
        return jnp.sum(jnp.exp2(sigmoid_RC * (cap * LOG2_E)), axis=1)

    for r in range(0, tile.rows, ROWS):
        sum_R = sum(sum_of_exponentials(r, c) for c in range(0, tile.columns, SWIZZLED))
        sums_gmem[lax.div(column, tile.columns), pl.ds(row + r, ROWS)] = sum_R
