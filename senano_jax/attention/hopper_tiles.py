"""What the Hopper attention kernels have in common: their sizes, and how one warpgroup loads for the other two.

A program owns 128 rows of the score matrix of one head (queries, or keys for dK and dV): 64 for each of two
warpgroups, since a tensor core instruction takes 64. A third warpgroup loads the tiles of columns that any of the rows
sees into a ring in shared memory. Each of the two takes those tiles that its own rows see, and waits for the others
only to release them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
COLUMNS = 64  # of a step: keys, or queries for dK and dV
SWIZZLE = 128  # bytes
SWIZZLED = SWIZZLE // 2  # bfloat16 numbers
# The kernel starts with 168 registers for each of 3 * 128 threads; what the loads do not need, the products take.
LOAD_REGISTERS = 24
COMPUTE_REGISTERS = 240
SCORES = plgpu.Layout.WGMMA
ROW = SCORES.reduce(1)  # one number for each row of a tile of scores
COLUMN = SCORES.reduce(0)


@dataclass(frozen=True)
class Stages:
    """How many tiles of columns each kernel's ring holds: those in use, and those on their way.

    The defaults were fastest on an H100, over documents of text at windows of 1, 7 and 14 blocks.
    """

    forward: int = 4
    dq: int = 3
    dkv: int = 3

    def __post_init__(self):
        # A step waits for the next keys before it releases the last values, or in dQ the last keys.
        assert self.forward >= 2 and self.dq >= 3, "too few stages: the kernel would wait for itself"


DEFAULT_STAGES = Stages()


def call(kernel, x, stages: int, *, name: str, out_type, scratch: dict, ring: dict):
    """`plgpu.kernel` of kernel(..., stages) over the programs of x, [B, T, H, D]; `ring` names the groups of loads that
    share barriers, with how many loads each has."""
    batch, length, heads, _ = x.shape
    barriers = {
        f"{group}_full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages) for group, loads in ring.items()
    } | {f"{group}_empty": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages) for group in ring}
    return plgpu.kernel(
        functools.partial(kernel, stages=stages),
        out_type=out_type,
        scratch_types=scratch | barriers,
        grid=(heads, length // PROGRAM_ROWS, batch),  # the first index varies fastest
        grid_names=("head", "rows", "sequence"),
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


def load_ring(
    stages: int, tile_at, count_steps, groups, *, after_reads: bool = False, load_others: Callable | None = None
):
    """The third warpgroup's part: the tiles of columns tile_at(0), tile_at(1), and so on.

    `groups` are (loads, full, empty); a load is (all columns in global memory, the ring they go to).
    `after_reads`: threads read the ring, too, not the tensor cores alone; copies must not overtake their reads.
    `load_others` starts loads of what warpgroups wait for when they are done with their columns. They come after the
    tiles that fill the ring, but not after all: those may wait for a warpgroup that waits for these.
    """
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

    def wait_until_empty(barrier):
        plgpu.barrier_wait(barrier)
        if after_reads:
            plgpu.commit_smem()

    def load(n):
        slot, columns = lax.rem(n, stages), pl.ds(tile_at(n) * COLUMNS, COLUMNS)
        for loads, full, empty in groups:
            pl.when(n >= stages)(functools.partial(wait_until_empty, empty.at[slot]))
            for source, ring in loads:
                plgpu.copy_gmem_to_smem(source.at[columns], ring.at[slot], full.at[slot])

    load(jnp.int32(0))  # is on its way while the bounds are read
    steps = count_steps()
    loaded = 1
    if load_others is not None:
        loaded = lax.min(steps, stages)
        lax.fori_loop(1, loaded, lambda n, _: load(n), None)
        load_others()
    lax.fori_loop(loaded, steps, lambda n, _: load(n), None)

    def drain(n, _):
        for _, _, empty in groups:
            plgpu.barrier_wait(empty.at[lax.rem(n, stages)])

    lax.fori_loop(lax.max(steps - stages, 0), steps, drain, None)


def floor_div(n, size: int):
    """n / size rounded down, for n >= 0: `//` would also compile the rules for negative numbers."""
    return lax.div(n, jnp.int32(size))


def ceil_div(n, size: int):
    """n / size rounded up, for n >= 0."""
    return floor_div(n + (size - 1), size)


def iota_of_rows():
    """0 to 63, one for each row."""
    return plgpu.layout_cast(lax.iota(jnp.int32, ROWS), ROW)


def along_rows(x_R, columns: int = COLUMNS):
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


def steps_of_keys(key_start_gmem, sequence, program_query0) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Of a program of queries: its nearest tile of keys, and a function that reads how many steps there are from it."""
    nearest = ceil_div(program_query0 + PROGRAM_ROWS, COLUMNS) - 1

    def count_steps():
        return nearest + 1 - floor_div(key_start_gmem[sequence, program_query0], COLUMNS)

    return nearest, count_steps


def visible_keys(key_start_gmem, sequence, query0, nearest) -> Visible:
    """For queries from query0; key tile nearest - n is step n, so that the first one depends on no bounds."""
    key_start_Q = plgpu.load(key_start_gmem.at[sequence, pl.ds(query0, ROWS)], layout=ROW, optimized=False)
    size_Q = query0 + 1 + iota_of_rows() - key_start_Q
    last_query_sees = key_start_gmem[sequence, query0 + (ROWS - 1)]

    def masked(score_QK, n):
        key0 = (nearest - n) * COLUMNS
        some_hidden = (key0 + (COLUMNS - 1) > query0) | (key0 < last_query_sees)
        return _hide_if(some_hidden, score_QK, key0 - key_start_Q, size_Q)

    begin = nearest + 1 - ceil_div(query0 + ROWS, COLUMNS)
    return Visible(begin, nearest + 1 - floor_div(key_start_gmem[sequence, query0], COLUMNS), masked)


def visible_queries(query_end_gmem, sequence, key0, nearest) -> Visible:
    """For keys from key0; query tile nearest + n is step n."""
    key_K = key0 + iota_of_rows()
    size_K = plgpu.load(query_end_gmem.at[sequence, pl.ds(key0, ROWS)], layout=ROW, optimized=False) - key_K
    first_key_until = query_end_gmem[sequence, key0]

    def masked(score_KQ, n):
        query0 = (nearest + n) * COLUMNS
        some_hidden = (query0 < key0 + (ROWS - 1)) | (query0 + COLUMNS > first_key_until)
        return _hide_if(some_hidden, score_KQ, query0 - key_K, size_K)

    end = ceil_div(query_end_gmem[sequence, key0 + (ROWS - 1)], COLUMNS) - nearest
    return Visible(floor_div(key0, COLUMNS) - nearest, end, masked)


def _hide_if(some_hidden, score_RC, offset_R, size_R):
    """Scores, MASKED where not 0 <= column + offset < size: one comparison of unsigned numbers, as in flash.py."""

    def hide(score_RC):
        column_RC = plgpu.broadcasted_iota(jnp.int32, score_RC.shape, 1, layout=SCORES)
        within_RC = (column_RC + along_rows(offset_R)).astype(jnp.uint32)
        return jnp.where(within_RC < along_rows(size_R.astype(jnp.uint32)), score_RC, MASKED)

    return lax.cond(some_hidden, hide, lambda score_RC: score_RC, score_RC)


def skip(slot, groups):
    """The loop body of a computing warpgroup for a tile that none of its rows sees."""

    def step(n, _):
        for _, full, empty in groups:
            plgpu.barrier_wait(full.at[slot(n)])
            plgpu.barrier_arrive(empty.at[slot(n)])

    return step
