"""A matrix product for Hopper GPUs that applies an elementwise function before it stores its result.

cuBLAS has no such function for relu(x)^2, so XLA would read and write the result once more.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from senano_jax.kernels import hopper_pipeline
from senano_jax.kernels.hopper_pipeline import Part
from senano_jax.kernels.hopper_tile import SWIZZLED, Tile, tile_for

FIRST_JAX = (0, 11)  # before it, Mosaic GPU had no square root, which the gradient of relu(x)^2 takes


def runs_here() -> bool:
    """Whether the default device is a Hopper GPU, and JAX new enough to compile for it."""
    if jax.__version_info__ < FIRST_JAX or jax.default_backend() != "gpu":
        return False
    return jax.local_devices()[0].compute_capability == "9.0"


def fits(rows: int, depth: int, columns: int, dtype) -> bool:
    """Whether the kernel takes [rows, depth] x [depth, columns] of this dtype."""
    return dtype == jnp.bfloat16 and tile_for(rows, depth, columns) is not None


@functools.partial(jax.jit, static_argnames=("epilogue", "tile"))  # lowered once for all layers
def matmul(
    a_MK: Float[Array, "M K"],
    b_KN: Float[Array, "K N"],
    epilogue: Callable[..., jax.Array],
    side_MN: Float[Array, "M N"] | None = None,
    tile: Tile | None = None,
) -> Float[Array, "M N"]:
    """epilogue(a b) or epilogue(a b, side); `epilogue` takes and returns bfloat16. Without a tile, that of tile_for."""
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    tile = tile or tile_for(rows, depth, columns)
    if a_MK.dtype != jnp.bfloat16 or tile is None or not tile.divides(rows, depth, columns):
        raise ValueError(f"no kernel for a product of {a_MK.shape} and {b_KN.shape} in {a_MK.dtype}")
    return hopper_pipeline.call(
        functools.partial(_finish, epilogue=epilogue, tile=tile, has_side=side_MN is not None),
        a_MK,
        b_KN,
        *([] if side_MN is None else [side_MN]),
        tile=tile,
        out_type=jax.ShapeDtypeStruct((rows, columns), a_MK.dtype),
        name="matmul",  # profiles count it among the products
    )


def _finish(part: Part, *refs, epilogue, tile: Tile, has_side: bool):
    side_gmem, out_gmem = refs if has_side else (None, *refs)

    def in_gmem(piece):
        row, column = part.place()
        return pl.ds(row, tile.rows), pl.ds(column + piece * tile.piece, tile.piece)

    def load_side(piece):
        """To where the result will be."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last piece has left shared memory
        plgpu.copy_gmem_to_smem(side_gmem.at[in_gmem(piece)], part.smem, part.loaded)

    if has_side:
        load_side(0)
    acc = part.multiply()
    for piece in range(tile.pieces):
        if has_side:
            plgpu.barrier_wait(part.loaded)
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for c in range(0, tile.piece, SWIZZLED):
            columns_smem = part.smem.at[:, pl.ds(c, SWIZZLED)]
            side = (columns_smem[...],) if has_side else ()
            start = piece * tile.piece + c
            columns_smem[...] = epilogue(acc[:, start : start + SWIZZLED].astype(columns_smem.dtype), *side)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part.smem, out_gmem.at[in_gmem(piece)])
        if has_side and piece + 1 < tile.pieces:
            load_side(piece + 1)
