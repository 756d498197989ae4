"""The forward kernel of attention for Hopper GPUs.

Each warpgroup multiplies the scores of its next tile of keys, then adds up the values of the last one; it weighs the
scores while the values are still being added (FlashAttention-3, arXiv 2407.08608). Shared memory at a head width of
128: 32 KB of queries, 32 of output, 32 of keys and values for each stage: 192 KB with four stages, of 227. Registers of
a thread, of 240: 64 for the output, 32 for scores that become weights, 16 for the last weights, and 32 for the queries,
which are kept in registers: that halves what the scores read of shared memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.attention import hopper_tiles as tiles
from senano_jax.attention.flash import LOG2_E, LOWEST
from senano_jax.attention.hopper_tiles import COLUMNS, PROGRAM_ROWS, ROW, ROWS, SCORES, WARPGROUPS, along_rows


@functools.partial(jax.jit, static_argnames=("scale", "stages"))  # lowered once for all layers
def forward(q, k, v, key_start_BT, scale: float, stages: int):
    """out, like q, and the log-sum-exp of its scores, float32 [B, H, T] in units of log2."""
    batch, length, heads, width = q.shape
    kernel = tiles.call(
        functools.partial(_kernel, scale=scale),
        q,
        stages,
        name="flash_forward",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch={
            "q_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "out_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "lse_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            "k_smem": tiles.swizzled(stages, COLUMNS, width),
            "v_smem": tiles.swizzled(stages, COLUMNS, width),
            "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        },
        ring={"k": 1, "v": 1},
    )
    return kernel(q, k, v, key_start_BT)


def _kernel(
    q_gmem, k_gmem, v_gmem, key_start_gmem, out_gmem, lse_gmem, *,
    q_smem, out_smem, lse_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    scale: float, stages: int,
):  # fmt: skip
    warpgroup, sequence, head = lax.axis_index("warpgroup"), lax.axis_index("sequence"), lax.axis_index("head")
    program_query0 = lax.axis_index("rows") * PROGRAM_ROWS
    nearest, count_steps = tiles.steps_of_keys(key_start_gmem, sequence, program_query0)
    groups = (
        ([(k_gmem.at[sequence, :, head], k_smem)], k_full, k_empty),
        ([(v_gmem.at[sequence, :, head], v_smem)], v_full, v_empty),
    )

    @pl.when(warpgroup == WARPGROUPS)
    def load():
        tiles.load_ring(stages, lambda n: nearest - n, count_steps, groups)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
        query0 = program_query0 + warpgroup * ROWS
        queries = pl.ds(query0, ROWS)
        own_q, own_out, own_lse = (smem.at[warpgroup] for smem in (q_smem, out_smem, lse_smem))
        plgpu.copy_gmem_to_smem(q_gmem.at[sequence, queries, head], own_q, q_full.at[warpgroup])
        width = own_q.shape[1]
        steps = count_steps()
        begin, end, masked = tiles.visible_keys(key_start_gmem, sequence, query0, nearest)

        def slot(n):
            return lax.rem(n, stages)

        skip = tiles.skip(slot, groups)
        lax.fori_loop(0, begin, skip, None)
        plgpu.barrier_wait(q_full.at[warpgroup])
        q_QD = plgpu.load(own_q, layout=SCORES)

        def weigh(n, max_Q, sum_Q, multiply_more):
            """Weights of step n; `multiply_more` starts products that may still run, and says how many."""

            def multiply(score_ref):
                plgpu.wgmma(score_ref, q_QD, k_smem.at[slot(n)].transpose((1, 0)))
                running = multiply_more()
                return plgpu.wgmma_accumulator_load(score_ref, wait_n=running)

            score_QK = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            plgpu.barrier_arrive(k_empty.at[slot(n)])
            score_QK = masked(score_QK, n)
            new_max_Q = jnp.maximum(max_Q, jnp.max(score_QK, axis=1) * (scale * LOG2_E))
            p_QK = jnp.exp2(score_QK * (scale * LOG2_E) - along_rows(new_max_Q))
            decay_Q = jnp.exp2(max_Q - new_max_Q)
            sum_Q = sum_Q * decay_Q + jnp.sum(p_QK, axis=1)
            weights = lax.optimization_barrier((p_QK, decay_Q, new_max_Q, sum_Q))
            # A branch, which the compiler does not put the weights off beyond: they overlap with what still runs.
            pl.when(n + 1 < end)(lambda: plgpu.barrier_wait(k_full.at[slot(n + 1)]))
            return weights

        def attend(out_ref):
            def add_values(n, p_QK):
                plgpu.barrier_wait(v_full.at[slot(n)])
                plgpu.wgmma(out_ref, p_QK, v_smem.at[slot(n)])
                return 1

            def step(n, carry):
                last_p_QK, max_Q, sum_Q = carry
                p_QK, decay_Q, max_Q, sum_Q = weigh(n, max_Q, sum_Q, lambda: add_values(n - 1, last_p_QK))
                out_QD = out_ref[...]  # waits for the values
                plgpu.barrier_arrive(v_empty.at[slot(n - 1)])
                out_ref[...] = out_QD * along_rows(decay_Q, width)
                return p_QK.astype(v_smem.dtype), max_Q, sum_Q

            zero_Q = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            plgpu.barrier_wait(k_full.at[slot(begin)])
            p_QK, _, max_Q, sum_Q = weigh(begin, zero_Q + LOWEST, zero_Q, lambda: 0)
            start = p_QK.astype(v_smem.dtype), max_Q, sum_Q
            p_QK, max_Q, sum_Q = lax.fori_loop(begin + 1, end, step, start)
            add_values(end - 1, p_QK)
            out_QD = out_ref[...]
            plgpu.barrier_arrive(v_empty.at[slot(end - 1)])
            return out_QD, max_Q, sum_Q

        out_QD, max_Q, sum_Q = pl.run_scoped(attend, plgpu.ACC((ROWS, width), jnp.float32))
        own_out[...] = (out_QD * along_rows(1 / sum_Q, width)).astype(own_out.dtype)
        own_lse[...] = max_Q + jnp.log2(sum_Q)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_out, out_gmem.at[sequence, queries, head])
        plgpu.copy_smem_to_gmem(own_lse, lse_gmem.at[sequence, head, queries])
        lax.fori_loop(end, steps, skip, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes themselves end before the kernel does
