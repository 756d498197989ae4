"""Queries, keys and values from the product that they are made of, before it is stored: for Hopper GPUs, in one kernel.

heads_kernels.py reads the product from memory. Here a warpgroup has whole heads of it in registers, float32, where it
normalises, turns or mixes them, so that the product itself is never written. Keys get no offset here: it takes numbers
of the token before, which another warpgroup may work on.

Names end in their dimensions: R the rows, tokens, that are worked on at a time, K the width of a head, E the pairs of
it that turn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from senano_jax.attention.hopper_tiles import ROWS, SCORES, along_rows
from senano_jax.kernels import hopper_matmul, hopper_pipeline
from senano_jax.kernels.hopper_pipeline import Part
from senano_jax.kernels.hopper_tile import Tile
from senano_jax.model.elementwise import NORM_EPSILON
from senano_jax.model.heads import RotaryTables
from senano_jax.model.rotary import turning_pairs

TILES = (Tile(shared="b"), Tile())  # the first one that fits is taken; 10% faster than the second one on an H100
TURNED = ("q", "k")  # the first two thirds of the product's columns; values are the last one


class Heads(NamedTuple):
    """Queries, keys and values, and what the backward pass needs beside them: None if not asked for."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    q_scale: Float[Array, "B H T"] | None  # what the norms multiplied with, float32
    k_scale: Float[Array, "B H T"] | None
    own_v: Float[Array, "B T H K"] | None  # the product's values; None, too, where nothing was mixed in: v is them


def fits(batch: int, length: int, depth: int, num_heads: int, width: int, dtype) -> bool:
    """Whether the kernel runs here, and takes [batch, length, depth] x [depth, slots 3 num_heads width] of this dtype,
    however many slots there are."""
    return hopper_matmul.runs_here() and _tile_for(batch, length, depth, num_heads, width, dtype) is not None


# Lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("num_heads", "slots", "with_residuals", "tile"))
def heads_matmul(
    x: Float[Array, "B T D"],
    w: Float[Array, "D S*3*H*K"],
    first_v: Float[Array, "B S*T H K"] | None,
    value_residual: Float[Array, ""],
    rotary: RotaryTables,
    num_heads: int,
    slots: int = 1,
    *,
    with_residuals: bool = False,
    tile: Tile | None = None,
) -> Heads:
    """What `prepare_heads` makes of x w, which is not rounded in between; bfloat16.

    A row of x w holds S `slots`, each a row of `num_heads` heads; the sequence is S T long (paired_heads.py).
    `with_residuals` asks for what the backward pass needs. Without a tile, the first one of TILES that fits. Raises
    ValueError for sizes or a dtype that the kernel does not take.
    """
    batch, length, depth = x.shape
    width = w.shape[1] // (slots * 3 * num_heads)
    tile = _tile_for(batch, length, depth, num_heads, width, x.dtype, TILES if tile is None else (tile,))
    if tile is None:
        raise ValueError(f"no kernel for {num_heads} heads of a product of {x.shape} and {w.shape} in {x.dtype}")
    tokens, mixed = batch * length, first_v is not None
    of_heads = jax.ShapeDtypeStruct((tokens, slots * num_heads * width), x.dtype)
    scales = jax.ShapeDtypeStruct((batch, num_heads, slots, length), jnp.float32)
    out_type = {"q": of_heads, "k": of_heads, "v": of_heads}
    if with_residuals:
        out_type |= {"q_scale": scales, "k_scale": scales} | ({"own_v": of_heads} if mixed else {})
    out = hopper_pipeline.call(
        functools.partial(_finish, num_heads=num_heads, width=width, length=length, tile=tile),
        x.reshape(tokens, depth),
        w,
        *(table.reshape(length, slots, -1) for table in rotary),
        first_v.reshape(of_heads.shape) if mixed else None,
        value_residual.reshape(1) if mixed else None,
        tile=tile,
        out_type=out_type,
        name="heads_matmul",  # profiles count it among the products
    )

    def of_rows(name):
        if name.endswith("scale"):
            return out[name].swapaxes(2, 3).reshape(batch, num_heads, slots * length)
        return out[name].reshape(batch, slots * length, num_heads, width)

    return Heads(*(of_rows(name) if name in out else None for name in Heads._fields))


def _tile_for(batch, length, depth, num_heads, width, dtype, tiles=TILES) -> Tile | None:
    def takes(tile):
        """Tiles are of one sequence and of queries, keys or values alone; what is stored at a time has whole heads."""
        of_heads = length % tile.rows == 0 and num_heads * width % tile.columns == 0 and tile.piece % width == 0
        return of_heads and tile.divides(batch * length, depth, 3 * num_heads * width)

    # A head's quarters are whole columns of the registers' layout, which holds 8 together.
    if dtype != jnp.bfloat16 or width not in (64, 128):
        return None
    return next((tile for tile in tiles if takes(tile)), None)


def _finish(
    part: Part, cos_gmem, sin_gmem, first_v_gmem, share_gmem, out, *, num_heads: int, width: int, length: int,
    tile: Tile,
):  # fmt: skip
    row, column = part.place()
    thirds, of_third = lax.div(column, num_heads * width), lax.rem(column, num_heads * width)
    slot, third = lax.div(thirds, 3), lax.rem(thirds, 3)
    column = slot * (num_heads * width) + of_third
    sequence, token = lax.div(row, length), lax.rem(row, length)
    is_value, mixed = third == len(TURNED), first_v_gmem is not None

    def in_gmem(piece):
        return pl.ds(row, tile.rows), pl.ds(column + piece * tile.piece, tile.piece)

    def load_first_v(piece):
        """To where the mixed values will be."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last piece has left shared memory
        plgpu.copy_gmem_to_smem(first_v_gmem.at[in_gmem(piece)], part.smem, part.loaded)

    def blocks():
        """In a piece: the first rows and columns of what is worked on at a time."""
        return ((r, c) for r in range(0, tile.rows, ROWS) for c in range(0, tile.piece, width))

    def in_smem(r, c):
        return part.smem.at[pl.ds(r, ROWS), pl.ds(c, width)]

    if mixed:
        pl.when(is_value)(lambda: load_first_v(0))
        share = share_gmem[0]  # on its way while the part is multiplied
    acc = part.multiply()

    def in_acc(piece, r, c):
        start = piece * tile.piece + c
        return acc[r : r + ROWS, start : start + width]

    @pl.when(is_value)
    def store_values():
        for piece in range(tile.pieces):
            if mixed:
                plgpu.barrier_wait(part.loaded)
                for r, c in blocks():
                    first_v_RK = in_smem(r, c)[...].astype(jnp.float32)
                    v_RK = (1 - share) * in_acc(piece, r, c) + share * first_v_RK
                    in_smem(r, c)[...] = v_RK.astype(part.smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(part.smem, out["v"].at[in_gmem(piece)])
            if not mixed or "own_v" in out:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for r, c in blocks():
                    in_smem(r, c)[...] = in_acc(piece, r, c).astype(part.smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(part.smem, out["own_v" if mixed else "v"].at[in_gmem(piece)])
            if mixed and piece + 1 < tile.pieces:
                load_first_v(piece + 1)

    @pl.when(~is_value)
    def store_turned():
        for piece in range(tile.pieces):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for r, c in blocks():
                rows, head = pl.ds(token + r, ROWS), lax.div(of_third + (piece * tile.piece + c), width)
                y_RK, scale_R = _turned(in_acc(piece, r, c), cos_gmem, sin_gmem, (rows, slot))
                in_smem(r, c)[...] = y_RK.astype(part.smem.dtype)
                for n, name in enumerate(TURNED):
                    if f"{name}_scale" in out:
                        pl.when(third == n)(
                            functools.partial(_store, out[f"{name}_scale"].at[sequence, head, slot, rows], scale_R)
                        )
            plgpu.commit_smem()
            for n, name in enumerate(TURNED):
                pl.when(third == n)(functools.partial(plgpu.copy_smem_to_gmem, part.smem, out[name].at[in_gmem(piece)]))


def _store(ref, x):
    ref[...] = x


def _turned(x_RK, cos_gmem, sin_gmem, positions):
    """One head of queries or keys, float32, normalised and turned by its positions, which are rows of a slot; and the
    norm's scale."""
    width = x_RK.shape[1]
    half, turning = width // 2, turning_pairs(width)
    cos_RE, sin_RE = (
        plgpu.load(table.at[*positions, pl.ds(0, turning)], layout=SCORES, optimized=False)
        for table in (cos_gmem, sin_gmem)
    )
    scale_R = lax.rsqrt(jnp.sum(x_RK * x_RK, axis=1) * (1 / width) + NORM_EPSILON)
    x_RK *= along_rows(scale_R, width)
    x1_RE, x2_RE = x_RK[:, :turning], x_RK[:, half : half + turning]
    y1_RE, y2_RE = x1_RE * cos_RE + x2_RE * sin_RE, x2_RE * cos_RE - x1_RE * sin_RE
    return jnp.concatenate([y1_RE, x_RK[:, turning:half], y2_RE, x_RK[:, half + turning :]], axis=1), scale_R
