"""What the Hopper attention kernels have in common: their sizes, and how one warpgroup loads for the other two.

A program owns 128 rows of the score matrix (queries, or keys for dK and dV): 64 for each of two warpgroups, since a
tensor core instruction takes 64. A third warpgroup loads the tiles of columns that any of the rows sees into a ring in
shared memory. Each of the two takes those tiles that its own rows see, and waits for the others only to release them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.attention.flash import MASKED

WARPGROUPS = 2  # that compute
ROWS = 64  # of a warpgroup
PROGRAM_ROWS = WARPGROUPS * ROWS
SWIZZLE = 128  # bytes
SWIZZLED = SWIZZLE // 2  # bfloat16 numbers
# The kernel starts with 168 registers for each of 3 * 128 threads; what the loads do not need, the products take.
LOAD_REGISTERS = 24
COMPUTE_REGISTERS = 240
SCORES = plgpu.Layout.WGMMA
ROW = SCORES.reduce(1)  # one number for each row of a tile of scores
COLUMN = SCORES.reduce(0)


@dataclass(frozen=True)
class HopperTile:
    """How one kernel goes through the score matrix."""

    columns: int  # of a step: keys, or queries for dK and dV
    stages: int  # of loads in flight
    heads: int = 1  # that a program goes through, at most: it loads for the next one while it ends the last
    in_registers: bool = False  # whether the rows' factors of the scores are kept there; not for dK and dV
    take_turns: bool = False  # whether one warpgroup multiplies while the other one weighs; forward only


@dataclass(frozen=True)
class HopperTiles:
    """The three kernels: forward and dQ loop over tiles of keys, dK/dV over tiles of queries."""

    forward: HopperTile = HopperTile(columns=128, stages=2, heads=2, in_registers=True, take_turns=True)
    dq: HopperTile = HopperTile(columns=64, stages=3, heads=2, in_registers=True)
    dkv: HopperTile = HopperTile(columns=64, stages=3, heads=2)

    def __post_init__(self):
        # A step waits for the next keys before it releases the last values, or in dQ the last keys.
        assert self.forward.stages >= 2 and self.dq.stages >= 3, "too few stages: the kernel would wait for itself"


DEFAULT_TILES = HopperTiles()


def call(kernel, x, tile: HopperTile, *, name: str, out_type, scratch: dict, ring: dict):
    """`plgpu.kernel` of kernel(..., tile) over the programs of x, [B, T, H, D]; `ring` names the groups of loads that
    share barriers, with how many loads each has."""
    batch, length, heads, _ = x.shape
    tile = replace(tile, heads=math.gcd(tile.heads, heads))
    barriers = {
        f"{group}_full": plgpu.Barrier(num_arrivals=loads, num_barriers=tile.stages) for group, loads in ring.items()
    } | {f"{group}_empty": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages) for group in ring}
    return plgpu.kernel(
        functools.partial(kernel, tile=tile),
        out_type=out_type,
        scratch_types=scratch | barriers,
        grid=(heads // tile.heads, length // PROGRAM_ROWS, batch),  # the first index varies fastest
        grid_names=("heads", "rows", "sequence"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # the sums along a row stay within a warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=name,
    )


def swizzled(*shape: int):
    """Shared memory for bfloat16 tiles, the last two dimensions as the tensor cores read them."""
    transforms = (plgpu.TilingTransform((8, SWIZZLED)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def load_ring(tile: HopperTile, tile_at, count_steps, head0, groups, *, after_reads: bool = False):
    """The third warpgroup's part: for one head after the other, the tiles of columns tile_at(0), tile_at(1), and so on.

    `groups` are (loads, full, empty); a load is a function (columns, head) -> the source, and the ring it goes to.
    `after_reads`: threads read the ring, too, not the tensor cores alone; copies must not overtake their reads.
    """
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

    def wait_until_empty(barrier):
        plgpu.barrier_wait(barrier)
        if after_reads:
            plgpu.commit_smem()

    def load(n, of_head, head):
        slot, columns = lax.rem(n, tile.stages), pl.ds(tile_at(of_head) * tile.columns, tile.columns)
        for loads, full, empty in groups:
            pl.when(n >= tile.stages)(functools.partial(wait_until_empty, empty.at[slot]))
            for source, ring in loads:
                plgpu.copy_gmem_to_smem(source(columns, head), ring.at[slot], full.at[slot])

    load(jnp.int32(0), jnp.int32(0), head0)  # is on its way while the bounds are read
    steps = count_steps()
    total = tile.heads * steps
    lax.fori_loop(1, total, lambda n, _: load(n, lax.rem(n, steps), head0 + lax.div(n, steps)), None)

    def drain(n, _):
        for _, _, empty in groups:
            plgpu.barrier_wait(empty.at[lax.rem(n, tile.stages)])

    lax.fori_loop(lax.max(total - tile.stages, 0), total, drain, None)


def floor_div(n, size: int):
    """n / size rounded down, for n >= 0: `//` would also compile the rules for negative numbers."""
    return lax.div(n, jnp.int32(size))


def ceil_div(n, size: int):
    """n / size rounded up, for n >= 0."""
    return floor_div(n + (size - 1), size)


def iota_of_rows():
    """0 to 63, one for each row."""
    return plgpu.layout_cast(lax.iota(jnp.int32, ROWS), ROW)


def along_rows(x_R, columns: int):
    """A number for each row, repeated along the row."""
    return lax.broadcast_in_dim(x_R, (ROWS, columns), [0])


def along_columns(x_C):
    """A number for each column, repeated along the column."""
    return lax.broadcast_in_dim(x_C, (ROWS, x_C.shape[0]), [1])


class Visible(NamedTuple):
    """What 64 rows see of the tiles that their program goes through."""

    begin: jax.Array  # of the program's steps, the first whose tile holds a visible column
    end: jax.Array  # one past the last
    masked: Callable  # (scores, step) -> scores, MASKED where hidden


def visible_keys(key_start_gmem, sequence, query0, nearest, columns: int) -> Visible:
    """For queries from query0; key tile nearest - n is step n, so that the first one depends on no bounds."""
    key_start_Q = plgpu.load(key_start_gmem.at[sequence, pl.ds(query0, ROWS)], layout=ROW, optimized=False)
    size_Q = query0 + 1 + iota_of_rows() - key_start_Q
    last_query_sees = key_start_gmem[sequence, query0 + (ROWS - 1)]

    def masked(score_QK, n):
        key0 = (nearest - n) * columns
        some_hidden = (key0 + (columns - 1) > query0) | (key0 < last_query_sees)
        return _hide_if(some_hidden, score_QK, key0 - key_start_Q, size_Q)

    begin = nearest + 1 - ceil_div(query0 + ROWS, columns)
    return Visible(begin, nearest + 1 - floor_div(key_start_gmem[sequence, query0], columns), masked)


def visible_queries(query_end_gmem, sequence, key0, nearest, columns: int) -> Visible:
    """For keys from key0; query tile nearest + n is step n."""
    key_K = key0 + iota_of_rows()
    size_K = plgpu.load(query_end_gmem.at[sequence, pl.ds(key0, ROWS)], layout=ROW, optimized=False) - key_K
    first_key_until = query_end_gmem[sequence, key0]

    def masked(score_KQ, n):
        query0 = (nearest + n) * columns
        some_hidden = (query0 < key0 + (ROWS - 1)) | (query0 + columns > first_key_until)
        return _hide_if(some_hidden, score_KQ, query0 - key_K, size_K)

    end = ceil_div(query_end_gmem[sequence, key0 + (ROWS - 1)], columns) - nearest
    return Visible(floor_div(key0, columns) - nearest, end, masked)


def _hide_if(some_hidden, score_RC, offset_R, size_R):
    """Scores, MASKED where not 0 <= column + offset < size: one comparison of unsigned numbers, as in flash.py."""

    def hide(score_RC):
        columns = score_RC.shape[1]
        column_RC = plgpu.broadcasted_iota(jnp.int32, score_RC.shape, 1, layout=SCORES)
        within_RC = (column_RC + along_rows(offset_R, columns)).astype(jnp.uint32)
        return jnp.where(within_RC < along_rows(size_R.astype(jnp.uint32), columns), score_RC, MASKED)

    return lax.cond(some_hidden, hide, lambda score_RC: score_RC, score_RC)


def skip(slot, groups, take_turn=lambda: None):
    """The loop body of a computing warpgroup for a tile that none of its rows sees."""

    def step(n, _):
        for _, full, empty in groups:
            plgpu.barrier_wait(full.at[slot(n)])
            plgpu.barrier_arrive(empty.at[slot(n)])
            take_turn()

    return step
