"""A matrix product for Hopper GPUs that applies an elementwise function before it stores its result.

cuBLAS has no such function for relu(x)^2, so XLA would read and write the result once more.

A third warpgroup loads what the other two multiply. These take turns: while one applies the function to its tile and
stores it, the other one multiplies for the next tile. A cluster of two blocks works on tiles side by side, so that one
load of the left operand serves both.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

WARPGROUPS = 2  # that multiply
CLUSTER = 2  # blocks that share the left operand's tiles
SWIZZLE = 128  # bytes
SWIZZLED = SWIZZLE // 2  # bfloat16 numbers


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: sizes in elements of the block that one cluster works on."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 5  # of loads in flight
    group: int = 8  # rows of tiles that clusters go through together, so that both operands stay in the L2 cache


DEFAULT_TILE = Tile()
FIRST_JAX = (0, 11)  # before it, Mosaic GPU had no square root, which the gradient of relu(x)^2 takes


def runs_here() -> bool:
    """Whether the default device is a Hopper GPU, and JAX new enough to compile for it."""
    if jax.__version_info__ < FIRST_JAX or jax.default_backend() != "gpu":
        return False
    return jax.local_devices()[0].compute_capability == "9.0"


def fits(rows: int, depth: int, columns: int, dtype, tile: Tile = DEFAULT_TILE) -> bool:
    """Whether the kernel takes [rows, depth] x [depth, columns] of this dtype."""
    return (
        dtype == jnp.bfloat16
        and rows % tile.rows == 0
        and columns % (CLUSTER * tile.columns) == 0
        and depth % tile.depth == 0
    )


@functools.partial(jax.jit, static_argnames=("epilogue", "tile"))  # lowered once for all layers
def matmul(
    a_MK: Float[Array, "M K"],
    b_KN: Float[Array, "K N"],
    epilogue: Callable[..., jax.Array],
    side_MN: Float[Array, "M N"] | None = None,
    tile: Tile = DEFAULT_TILE,
) -> Float[Array, "M N"]:
    """epilogue(a b) or epilogue(a b, side); `epilogue` takes and returns bfloat16."""
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    if not fits(rows, depth, columns, a_MK.dtype, tile):
        raise ValueError(f"no kernel for a product of {a_MK.shape} and {b_KN.shape} in {a_MK.dtype}")
    swizzled = (plgpu.TilingTransform((8, SWIZZLED)), plgpu.SwizzleTransform(SWIZZLE))
    scratch = {
        "a_smem": plgpu.SMEM((tile.stages, tile.rows, tile.depth), a_MK.dtype, transforms=swizzled),
        "b_smem": plgpu.SMEM((tile.stages, tile.depth, tile.columns), a_MK.dtype, transforms=swizzled),
        "tile_smem": plgpu.SMEM((WARPGROUPS, tile.rows, tile.columns), a_MK.dtype, transforms=swizzled),
        # Each warpgroup waits for its own loads only, so that it sees every phase of its barriers.
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS * tile.stages),
        "empty": plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=tile.stages),
        "side_full": plgpu.Barrier(num_barriers=WARPGROUPS),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, epilogue=epilogue, tile=tile, has_side=side_MN is not None),
        out_type=jax.ShapeDtypeStruct((rows, columns), a_MK.dtype),
        scratch_types=scratch,
        grid=(jax.local_devices()[0].core_count // CLUSTER,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(a_MK, b_KN, *([] if side_MN is None else [side_MN]))


def _kernel(
    a_gmem, b_gmem, *refs, a_smem, b_smem, tile_smem, full, empty, side_full, epilogue, tile: Tile, has_side: bool
):
    side_gmem, out_gmem = refs if has_side else (None, *refs)
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
    row_tiles = a_gmem.shape[0] // tile.rows
    column_tiles = b_gmem.shape[1] // (CLUSTER * tile.columns)
    depth_steps = a_gmem.shape[1] // tile.depth
    own_tiles = lax.div(row_tiles * column_tiles - cluster + clusters - 1, clusters)

    def place(t):
        """Rows and columns of the block's t-th tile."""
        row, column = _grouped(cluster + t * clusters, row_tiles, column_tiles, tile.group)
        return pl.ds(row * tile.rows, tile.rows), pl.ds((column * CLUSTER + block) * tile.columns, tile.columns)

    @pl.when(warpgroup == WARPGROUPS)
    def load():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(t, _):
            rows, columns = place(t)

            def load_step(k, _):
                step = t * depth_steps + k
                slot = lax.rem(step, tile.stages)

                @pl.when(step >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                loaded = full.at[lax.rem(t, WARPGROUPS) * tile.stages + slot]
                depth = pl.ds(k * tile.depth, tile.depth)
                plgpu.copy_gmem_to_smem(a_gmem.at[rows, depth], a_smem.at[slot], loaded, collective_axes="block")
                plgpu.copy_gmem_to_smem(b_gmem.at[depth, columns], b_smem.at[slot], loaded)

            lax.fori_loop(0, depth_steps, load_step, None)

        lax.fori_loop(0, own_tiles, load_tile, None)

        # Neither block of a cluster may end while the other one still signals to it. A barrier that no load used gets
        # no signal.
        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, tile.stages)])

        steps = own_tiles * depth_steps
        lax.fori_loop(lax.max(steps - tile.stages, 0), steps, drain, None)

    @pl.when(warpgroup < WARPGROUPS)
    def multiply():
        plgpu.set_max_registers(232, action="increase")
        own_tile = tile_smem.at[warpgroup]

        def multiply_tile(i, _):
            t = i * WARPGROUPS + warpgroup
            first = t * depth_steps
            in_gmem = place(t)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile has left shared memory
            if has_side:
                plgpu.copy_gmem_to_smem(side_gmem.at[in_gmem], own_tile, side_full.at[warpgroup])

            def accumulate(acc_ref):
                def product(k, _):
                    slot = lax.rem(first + k, tile.stages)
                    plgpu.barrier_wait(full.at[warpgroup * tile.stages + slot])
                    plgpu.wgmma(acc_ref, a_smem.at[slot], b_smem.at[slot])
                    plgpu.wgmma_wait(1)  # the product before this one is done

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(first + k - 1, tile.stages)])

                lax.fori_loop(0, depth_steps, product, None)
                result = acc_ref[...]
                plgpu.barrier_arrive(empty.at[lax.rem(first + depth_steps - 1, tile.stages)])
                return result

            acc = pl.run_scoped(accumulate, plgpu.ACC((tile.rows, tile.columns), jnp.float32))
            if has_side:
                plgpu.barrier_wait(side_full.at[warpgroup])
            for c in range(0, tile.columns, SWIZZLED):
                part = own_tile.at[:, pl.ds(c, SWIZZLED)]
                side = (part[...],) if has_side else ()
                part[...] = epilogue(acc[:, c : c + SWIZZLED].astype(part.dtype), *side)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_tile, out_gmem.at[in_gmem])

        lax.fori_loop(0, lax.div(own_tiles - warpgroup + WARPGROUPS - 1, WARPGROUPS), multiply_tile, None)
        plgpu.wait_smem_to_gmem(0)


def _grouped(i, rows: int, columns: int, group: int):
    """The i-th tile of an order that finishes `group` rows of tiles, column by column, before the next ones."""
    first = lax.div(i, group * columns) * group
    size = lax.min(rows - first, group)
    i -= first * columns
    return first + lax.rem(i, size), lax.div(i, size)
