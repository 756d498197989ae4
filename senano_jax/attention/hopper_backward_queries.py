"""The backward kernel of attention for Hopper GPUs whose rows are queries: dQ.

Shared memory at a head width of 128, in KB of 227: 32 each of queries, cotangents, outputs and dQ, 32 of keys and
values for each stage: 224 with three stages. Registers of a thread, of 240: 64 for dQ; scores and their cotangents 32
each; the left factor of a product that runs 16; queries and cotangents, which are kept in registers, 32 each: with 64
columns, products of two factors in shared memory read it as fast as it can be read. Wider tiles of scores leave no room
for dQ.

It can go on to the gradient of the product that queries were made of (hopper_heads.py). It does so when dQ is done, so
that this takes no registers from the products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.attention import hopper_tiles as tiles
from senano_jax.attention.flash import LOG2_E
from senano_jax.attention.hopper_heads import Turned, pulled_back
from senano_jax.attention.hopper_tiles import COLUMNS, PROGRAM_ROWS, ROW, ROWS, SCORES, WARPGROUPS, along_rows


@functools.partial(jax.jit, static_argnames=("scale", "stages"))  # lowered once for all layers
def backward_queries(
    q, k, v, out, dout, lse_BHT, key_start_BT, scale: float, stages: int, turned: Turned | None = None
):
    """dQ, and delta = rowsum(dout * out), float32 [B, H, T], for `backward_keys`: here because dout is at hand.

    With `turned`, which tells how queries were made, not dQ but the gradient of the product, [B, T, 3*H, D], of which
    the heads of queries are written and no others.
    """
    batch, length, heads, width = q.shape
    dq_shape = q.shape if turned is None else (batch, length, 3 * heads, width)
    kernel = tiles.call(
        functools.partial(_kernel, scale=scale),
        q,
        stages,
        name="flash_backward_queries",
        out_type=(jax.ShapeDtypeStruct(dq_shape, q.dtype), jax.ShapeDtypeStruct(lse_BHT.shape, jnp.float32)),
        scratch={
            "q_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "dout_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "out_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "dq_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
            "lse_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            "delta_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            "k_smem": tiles.swizzled(stages, COLUMNS, width),
            "v_smem": tiles.swizzled(stages, COLUMNS, width),
            "rows_full": plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
        },
        ring={"k": 1, "v": 1},
    )
    return kernel(q, k, v, out, dout, lse_BHT, key_start_BT, turned)


def _kernel(
    q_gmem, k_gmem, v_gmem, out_gmem, dout_gmem, lse_gmem, key_start_gmem, turned, dq_gmem, delta_gmem, *,
    q_smem, dout_smem, out_smem, dq_smem, lse_smem, delta_smem, k_smem, v_smem,
    rows_full, k_full, k_empty, v_full, v_empty,
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
        own_q, own_dout, own_out, own_dq = (smem.at[warpgroup] for smem in (q_smem, dout_smem, out_smem, dq_smem))
        own_lse, own_delta = (smem.at[warpgroup] for smem in (lse_smem, delta_smem))
        for gmem, smem in ((q_gmem, own_q), (dout_gmem, own_dout), (out_gmem, own_out)):
            plgpu.copy_gmem_to_smem(gmem.at[sequence, queries, head], smem, rows_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(lse_gmem.at[sequence, head, queries], own_lse, rows_full.at[warpgroup])
        width = own_q.shape[1]
        steps = count_steps()
        begin, end, masked = tiles.visible_keys(key_start_gmem, sequence, query0, nearest)

        def slot(n):
            return lax.rem(n, stages)

        skip = tiles.skip(slot, groups)
        lax.fori_loop(0, begin, skip, None)
        plgpu.barrier_wait(rows_full.at[warpgroup])
        lse_Q = plgpu.load(own_lse, layout=ROW)
        dout_QD = plgpu.load(own_dout, layout=SCORES)
        out_QD = plgpu.load(own_out, layout=SCORES)
        delta_Q = jnp.sum(out_QD.astype(jnp.float32) * dout_QD.astype(jnp.float32), axis=1)
        q_QD = plgpu.load(own_q, layout=SCORES)

        def differentiate(n, multiply_more):
            """dscore of step n; `multiply_more` starts products that may still run, and says how many."""

            def multiply(score_ref, dp_ref):
                plgpu.wgmma(score_ref, q_QD, k_smem.at[slot(n)].transpose((1, 0)))
                plgpu.barrier_wait(v_full.at[slot(n)])
                plgpu.wgmma(dp_ref, dout_QD, v_smem.at[slot(n)].transpose((1, 0)))
                running = multiply_more()
                score_QK = plgpu.wgmma_accumulator_load(score_ref, wait_n=1 + running)
                score_QK = masked(score_QK, n)
                p_QK = jnp.exp2(score_QK * (scale * LOG2_E) - along_rows(lse_Q))
                dp_QK = plgpu.wgmma_accumulator_load(dp_ref, wait_n=running)
                plgpu.barrier_arrive(v_empty.at[slot(n)])
                dscore_QK = p_QK * (dp_QK - along_rows(delta_Q))
                return lax.optimization_barrier(dscore_QK)

            scores = plgpu.ACC((ROWS, COLUMNS), jnp.float32)
            return pl.run_scoped(multiply, scores, scores)

        def accumulate(dq_ref):
            def add_keys(n, dscore_QK):
                plgpu.wgmma(dq_ref, dscore_QK, k_smem.at[slot(n)])
                return 1

            def step(n, last_dscore_QK):
                dscore_QK = differentiate(n, lambda: add_keys(n - 1, last_dscore_QK))
                # A branch, which the compiler does not put dscore off beyond: it overlaps with what still runs.
                pl.when(n + 1 < end)(lambda: plgpu.barrier_wait(k_full.at[slot(n + 1)]))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_empty.at[slot(n - 1)])
                return dscore_QK.astype(k_smem.dtype)

            plgpu.barrier_wait(k_full.at[slot(begin)])
            dscore_QK = differentiate(begin, lambda: 0).astype(k_smem.dtype)
            pl.when(begin + 1 < end)(lambda: plgpu.barrier_wait(k_full.at[slot(begin + 1)]))
            dscore_QK = lax.fori_loop(begin + 1, end, step, dscore_QK)
            add_keys(end - 1, dscore_QK)
            dq_QD = dq_ref[...]
            plgpu.barrier_arrive(k_empty.at[slot(end - 1)])
            return dq_QD

        dq_QD = pl.run_scoped(accumulate, plgpu.ACC((ROWS, width), jnp.float32))
        own_delta[...] = delta_Q
        if turned is None:
            dq_QD *= scale
        else:
            dq_QD = pulled_back(dq_QD, q_QD, turned, sequence, head, queries, scale)
        own_dq[...] = dq_QD.astype(own_dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_delta, delta_gmem.at[sequence, head, queries])
        plgpu.copy_smem_to_gmem(own_dq, dq_gmem.at[sequence, queries, head])
        lax.fori_loop(end, steps, skip, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes themselves end before the kernel does
