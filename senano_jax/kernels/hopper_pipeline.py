"""How a Hopper GPU multiplies matrices tile by tile; what becomes of a tile, its caller says.

A third warpgroup loads what the other two multiply. These take turns: while one finishes its tile and stores it, the
other one multiplies for the next tile. A cluster of two blocks works on tiles side by side or one above the other, so
that one load of the operand that they share serves both.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from senano_jax.kernels.hopper_tile import CLUSTER, SWIZZLE, SWIZZLED, WARPGROUPS, Tile


class Part(NamedTuple):
    """The part of a product that a warpgroup works on, and what is its own meanwhile.

    A warpgroup's stores may still read its shared memory when it gets its next part.
    """

    place: Callable[[], tuple[jax.Array, jax.Array]]  # its first row and its first column
    multiply: Callable[[], jax.Array]  # float32 [tile.rows, tile.columns]; to be called once
    smem: jax.Ref  # [tile.rows, tile.piece]
    loaded: jax.Ref  # a barrier for one load at a time


def call(
    finish: Callable[..., None],
    a_MK: Float[Array, "M K"],
    b_KN: Float[Array, "K N"],
    *others: jax.Array | None,
    tile: Tile,
    out_type,
    name: str,
):
    """Runs finish(part, *others, *outputs), these in global memory, for every part of a b, and returns the outputs.

    The operands are bfloat16, and whole tiles.
    """
    swizzled = (plgpu.TilingTransform((8, SWIZZLED)), plgpu.SwizzleTransform(SWIZZLE))
    scratch = {
        "a_smem": plgpu.SMEM((tile.stages, tile.rows, tile.depth), a_MK.dtype, transforms=swizzled),
        "b_smem": plgpu.SMEM((tile.stages, tile.depth, tile.columns), a_MK.dtype, transforms=swizzled),
        "piece_smem": plgpu.SMEM((WARPGROUPS, tile.rows, tile.piece), a_MK.dtype, transforms=swizzled),
        # Each warpgroup waits for its own loads only, so that it sees every phase of its barriers.
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS * tile.stages),
        "empty": plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=tile.stages),
        "piece_loaded": plgpu.Barrier(num_barriers=WARPGROUPS),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, finish=finish, tile=tile),
        out_type=out_type,
        scratch_types=scratch,
        grid=(jax.local_devices()[0].core_count // CLUSTER,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # sums along a row stay within a warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=name,
    )
    return kernel(a_MK, b_KN, *others)


def _kernel(a_gmem, b_gmem, *refs, a_smem, b_smem, piece_smem, full, empty, piece_loaded, finish, tile: Tile):
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
    row_tiles = a_gmem.shape[0] // tile.cluster_rows
    column_tiles = b_gmem.shape[1] // tile.cluster_columns
    depth_steps = a_gmem.shape[1] // tile.depth
    cluster_tiles = lax.div(row_tiles * column_tiles - cluster + clusters - 1, clusters)

    def nth(t):
        """The cluster's t-th tile: which one of the rows of tiles, and of the columns."""
        return _grouped(cluster + t * clusters, row_tiles, column_tiles, tile.group)

    def place(at):
        """First row and first column of the block's part of a tile."""
        row, column = at[0] * tile.cluster_rows, at[1] * tile.cluster_columns
        return (row, column + block * tile.columns) if tile.shared == "a" else (row + block * tile.rows, column)

    def full_barrier(t, slot):
        return full.at[lax.rem(t, WARPGROUPS) * tile.stages + slot]

    @pl.when(warpgroup == WARPGROUPS)
    def load():
        plgpu.set_max_registers(40, action="decrease")
        a_axes, b_axes = ("block", None) if tile.shared == "a" else (None, "block")

        def load_tile(t, _):
            row, column = place(nth(t))
            rows, columns = pl.ds(row, tile.rows), pl.ds(column, tile.columns)

            def load_step(k, _):
                step = t * depth_steps + k
                slot = lax.rem(step, tile.stages)

                @pl.when(step >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                loaded = full_barrier(t, slot)
                depth = pl.ds(k * tile.depth, tile.depth)
                plgpu.copy_gmem_to_smem(a_gmem.at[rows, depth], a_smem.at[slot], loaded, collective_axes=a_axes)
                plgpu.copy_gmem_to_smem(b_gmem.at[depth, columns], b_smem.at[slot], loaded, collective_axes=b_axes)

            lax.fori_loop(0, depth_steps, load_step, None)

        lax.fori_loop(0, cluster_tiles, load_tile, None)

        # Neither block of a cluster may end while the other one still signals to it. A barrier that no load used gets
        # no signal.
        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, tile.stages)])

        steps = cluster_tiles * depth_steps
        lax.fori_loop(lax.max(steps - tile.stages, 0), steps, drain, None)

    @pl.when(warpgroup < WARPGROUPS)
    def multiply_tiles():
        plgpu.set_max_registers(232, action="increase")
        own_smem, loaded = piece_smem.at[warpgroup], piece_loaded.at[warpgroup]

        def multiply_tile(i, _):
            t = i * WARPGROUPS + warpgroup
            first = t * depth_steps
            at = nth(t)

            def accumulate(acc_ref):
                def product(k, _):
                    slot = lax.rem(first + k, tile.stages)
                    plgpu.barrier_wait(full_barrier(t, slot))
                    plgpu.wgmma(acc_ref, a_smem.at[slot], b_smem.at[slot])
                    plgpu.wgmma_wait(1)  # the product before this one is done

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(first + k - 1, tile.stages)])

                lax.fori_loop(0, depth_steps, product, None)
                result = acc_ref[...]
                plgpu.barrier_arrive(empty.at[lax.rem(first + depth_steps - 1, tile.stages)])
                return result

            def multiply():
                return pl.run_scoped(accumulate, plgpu.ACC((tile.rows, tile.columns), jnp.float32))

            finish(Part(lambda: place(at), multiply, own_smem, loaded), *refs)

        own_tiles = lax.div(cluster_tiles - warpgroup + WARPGROUPS - 1, WARPGROUPS)
        lax.fori_loop(0, own_tiles, multiply_tile, None)
        plgpu.wait_smem_to_gmem(0)


def _grouped(i, rows: int, columns: int, group: int):
    """The i-th tile of an order that finishes `group` rows of tiles, column by column, before the next ones."""
    first = lax.div(i, group * columns) * group
    size = lax.min(rows - first, group) if rows % group else group  # to divide by a constant takes less time
    i -= first * columns
    return first + lax.rem(i, size), lax.div(i, size)
