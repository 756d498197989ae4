"""The backward kernel of attention for Hopper GPUs whose rows are keys: dK and dV.

Shared memory at a head width of 128, in KB of 227: 32 each of keys, values, dK and dV, 32.5 of queries, cotangents and
their numbers for each stage: 225.5 with three. Registers of a thread, of 240: 128 for dK and dV; scores and their
cotangents 32 each; the left factor of a product that runs 16.

It can go on to the gradient of the product that keys and values were made of (hopper_heads.py). It does so when dK and
dV are done, so that this takes no registers from the products, and in the shared memory that there is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.attention import hopper_tiles as tiles
from senano_jax.attention.flash import LOG2_E
from senano_jax.attention.hopper_heads import Mixed, Turned, pulled_back
from senano_jax.attention.hopper_tiles import (
    COLUMN,
    COLUMNS,
    PROGRAM_ROWS,
    ROWS,
    SCORES,
    WARPGROUPS,
    along_columns,
)


@functools.partial(jax.jit, static_argnames=("scale", "stages"))  # lowered once for all layers
def backward_keys(q, k, v, dout, lse_BHT, delta_BHT, query_end_BT, scale: float, stages: int, other_dv=None):
    """dK and dV, to which `other_dv` is added, if it is given; each like k."""
    gradients = _call((q, k, v, dout, lse_BHT, delta_BHT, query_end_BT), scale, stages, other_dv)
    return gradients["dk"], gradients["dv"]


@functools.partial(jax.jit, static_argnames=("scale", "stages"))  # lowered once for all layers
def backward_to_product(
    dqkv, q, k, v, dout, lse_BHT, delta_BHT, query_end_BT, scale: float, stages: int,
    other_dv=None, turned: Turned | None = None, mixed: Mixed | None = None,
):  # fmt: skip
    """`dqkv`, [B, T, 3*H, D], of which the heads of values are written, and those of keys if `turned` tells how these
    were made. Without `mixed`, which tells how values were made, they are the product's own.

    And by name what is not in it: without `turned` "dk", like k; with `mixed` "dv", like v, and "d_first_share" by row,
    float32 [B, H, T], to be summed. `other_dv` is added to dV, if it is given.
    """
    dqkv_ref = jax.new_ref(dqkv)  # to be written in place: the heads of queries are there
    rows = q, k, v, dout, lse_BHT, delta_BHT, query_end_BT
    others = _call(rows, scale, stages, other_dv, turned, mixed, dqkv_ref)
    return jax.freeze(dqkv_ref), others


def _call(rows, scale, stages, other_dv, turned=None, mixed=None, dqkv_ref=None) -> dict[str, jax.Array]:
    """Runs the kernel; returns what it does not write to `dqkv_ref`, by name."""
    _, k, _, _, lse_BHT, *_ = rows
    width, like_k = k.shape[3], jax.ShapeDtypeStruct(k.shape, k.dtype)
    out_type = {}
    if turned is None:
        out_type["dk"] = like_k
    if dqkv_ref is None or mixed is not None:
        out_type["dv"] = like_k
    scratch = {
        "k_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
        "v_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
        "dk_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
        "dv_smem": tiles.swizzled(WARPGROUPS, ROWS, width),
        "q_smem": tiles.swizzled(stages, COLUMNS, width),
        "dout_smem": tiles.swizzled(stages, COLUMNS, width),
        "lse_smem": plgpu.SMEM((stages, COLUMNS), jnp.float32),
        "delta_smem": plgpu.SMEM((stages, COLUMNS), jnp.float32),
        "rows_full": plgpu.Barrier(num_arrivals=2 + (other_dv is not None), num_barriers=WARPGROUPS),
    }
    if mixed is not None:
        out_type["d_first_share"] = jax.ShapeDtypeStruct(lse_BHT.shape, jnp.float32)
        scratch["mixed_full"] = plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)
    kernel = tiles.call(
        functools.partial(_kernel, scale=scale),
        k,
        stages,
        name="flash_backward_keys",
        out_type=out_type,
        scratch=scratch,
        ring={"q": 2, "dout": 2},
    )
    return kernel(*rows, other_dv, turned, mixed, dqkv_ref)


def _kernel(
    q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem, query_end_gmem,
    other_dv_gmem, turned, mixed, dqkv_gmem, out_gmems, *,
    k_smem, v_smem, dk_smem, dv_smem, q_smem, dout_smem, lse_smem, delta_smem,
    rows_full, q_full, q_empty, dout_full, dout_empty,
    scale: float, stages: int, mixed_full=None,
):  # fmt: skip
    """On transposed tiles: probabilities come out of one product as the left factor of the next.

    Of a warpgroup's own tiles dk and dv are free until there are gradients, and hold what these are made with:
    `other_dv` in dv; with `mixed` the product's values in dk and first_v in dv, or, if that is taken, in v as soon as
    the products are done with it. Then dK goes to k, the gradient of the product's values to dk, dV to dv. Without
    `mixed` dK goes to dk.
    """
    warpgroup, sequence, head = lax.axis_index("warpgroup"), lax.axis_index("sequence"), lax.axis_index("head")
    program_key0, heads = lax.axis_index("rows") * PROGRAM_ROWS, k_gmem.shape[2]
    nearest = tiles.floor_div(program_key0, COLUMNS)

    def count_steps():
        last_key_until = query_end_gmem[sequence, program_key0 + (PROGRAM_ROWS - 1)]
        return tiles.ceil_div(last_key_until, COLUMNS) - nearest

    all_q, all_dout = (gmem.at[sequence, :, head] for gmem in (q_gmem, dout_gmem))
    all_lse, all_delta = (gmem.at[sequence, head] for gmem in (lse_gmem, delta_gmem))
    groups = (
        ([(all_q, q_smem), (all_lse, lse_smem)], q_full, q_empty),
        ([(all_dout, dout_smem), (all_delta, delta_smem)], dout_full, dout_empty),
    )

    def load_mixed():
        """What values were mixed of."""
        for computing in range(WARPGROUPS):
            keys, full = pl.ds(program_key0 + computing * ROWS, ROWS), mixed_full.at[computing]
            own_gmem = mixed.own.at[sequence, keys, head]
            plgpu.copy_gmem_to_smem(own_gmem, dk_smem.at[computing], full)
            if other_dv_gmem is None:
                plgpu.copy_gmem_to_smem(mixed.first_v.at[sequence, keys, head], dv_smem.at[computing], full)

    @pl.when(warpgroup == WARPGROUPS)
    def load():
        others = None if mixed is None else load_mixed
        tiles.load_ring(stages, lambda n: nearest + n, count_steps, groups, after_reads=True, load_others=others)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
        key0 = program_key0 + warpgroup * ROWS
        keys = pl.ds(key0, ROWS)
        own_k, own_v, own_dk, own_dv = (smem.at[warpgroup] for smem in (k_smem, v_smem, dk_smem, dv_smem))
        loads = [(k_gmem, own_k), (v_gmem, own_v)]
        if other_dv_gmem is not None:
            loads.append((other_dv_gmem, own_dv))  # it waits where the sum will be stored
        for gmem, smem in loads:
            plgpu.copy_gmem_to_smem(gmem.at[sequence, keys, head], smem, rows_full.at[warpgroup])
        width = own_k.shape[1]
        steps = count_steps()
        begin, end, masked = tiles.visible_queries(query_end_gmem, sequence, key0, nearest)

        def slot(n):
            return lax.rem(n, stages)

        skip = tiles.skip(slot, groups)
        lax.fori_loop(0, begin, skip, None)
        plgpu.barrier_wait(rows_full.at[warpgroup])

        def accumulate(dk_ref, dv_ref):
            def step(n, _):
                queries, cotangents = q_smem.at[slot(n)], dout_smem.at[slot(n)]

                def differentiate(score_ref, dp_ref):
                    plgpu.barrier_wait(q_full.at[slot(n)])
                    plgpu.wgmma(score_ref, own_k, queries.transpose((1, 0)))
                    plgpu.barrier_wait(dout_full.at[slot(n)])
                    plgpu.wgmma(dp_ref, own_v, cotangents.transpose((1, 0)))
                    score_KQ = plgpu.wgmma_accumulator_load(score_ref, wait_n=1)
                    score_KQ = masked(score_KQ, n)
                    lse_Q = plgpu.load(lse_smem.at[slot(n)], layout=COLUMN)
                    p_KQ = jnp.exp2(score_KQ * (scale * LOG2_E) - along_columns(lse_Q))
                    plgpu.wgmma(dv_ref, p_KQ.astype(dout_smem.dtype), cotangents)
                    dp_KQ = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
                    delta_Q = plgpu.load(delta_smem.at[slot(n)], layout=COLUMN)
                    return (p_KQ * (dp_KQ - along_columns(delta_Q))).astype(q_smem.dtype)

                scores = plgpu.ACC((ROWS, COLUMNS), jnp.float32)
                dscore_KQ = pl.run_scoped(differentiate, scores, scores)
                plgpu.wgmma(dk_ref, dscore_KQ, queries)
                plgpu.wgmma_wait(1)  # dV's product is done
                plgpu.barrier_arrive(dout_empty.at[slot(n)])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_empty.at[slot(n)])

            lax.fori_loop(begin, end, step, None)
            return dk_ref[...], dv_ref[...]

        sums = plgpu.ACC((ROWS, width), jnp.float32)
        dk_KD, dv_KD = pl.run_scoped(accumulate, sums, sums)
        if mixed is not None:
            own_share = 1 - mixed.first_share[0]  # on its way while the keys' gradient is computed
        if mixed is not None and other_dv_gmem is not None:
            plgpu.commit_smem()  # all threads' products are done with the values
            plgpu.copy_gmem_to_smem(mixed.first_v.at[sequence, keys, head], own_v, mixed_full.at[warpgroup])
        if turned is None:
            dk_KD *= scale
        else:
            dk_KD = pulled_back(dk_KD, plgpu.load(own_k, layout=SCORES), turned, sequence, head, keys, scale)
        stored_dk = own_dk if mixed is None else own_k
        stored_dk[...] = dk_KD.astype(stored_dk.dtype)
        stores = [(stored_dk, out_gmems["dk"], head) if "dk" in out_gmems else (stored_dk, dqkv_gmem, heads + head)]
        if other_dv_gmem is not None:
            dv_KD += plgpu.load(own_dv, layout=SCORES).astype(jnp.float32)
        if mixed is not None:
            plgpu.barrier_wait(mixed_full.at[warpgroup])
            own_first_v = own_dv if other_dv_gmem is None else own_v
            v_KD, first_v_KD = (plgpu.load(x, layout=SCORES).astype(jnp.float32) for x in (own_dk, own_first_v))
            d_first_share = out_gmems["d_first_share"].at[sequence, head, keys]
            d_first_share[...] = jnp.sum(dv_KD * (first_v_KD - v_KD), axis=1)
            own_dk[...] = (dv_KD * own_share).astype(own_dk.dtype)
            stores.append((own_dk, dqkv_gmem, 2 * heads + head))
        own_dv[...] = dv_KD.astype(own_dv.dtype)
        stores.append((own_dv, out_gmems["dv"], head) if "dv" in out_gmems else (own_dv, dqkv_gmem, 2 * heads + head))
        plgpu.commit_smem()
        for smem, gmem, place in stores:
            plgpu.copy_smem_to_gmem(smem, gmem.at[sequence, keys, place])
        lax.fori_loop(end, steps, skip, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes themselves end before the kernel does
