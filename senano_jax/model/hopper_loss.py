"""Log-sum-exp of soft-capped logits and the loss's gradient for Hopper GPUs, in Pallas's Mosaic GPU.

A block owns a token and keeps its row of logits in shared memory between two walks over it, so that global memory is
read once and written once: 1.65 GB for 8,192 tokens of 50,304 bfloat16 logits. The first walk takes three exponentials
and roots a logit and leaves in the place of z what does not depend on the sum, exp(logit) times the cap's derivative,
as a float of 16 bits (see Short). The second walk multiplies that by one number. Two blocks share a multiprocessor, so
that one computes while the other one waits for its row.

Each of three warpgroups loads, walks over and stores a third of the row; they meet once, for the sum. A third consists
of lines of 128 logits, what the 32 threads of a warp read in one instruction.

Names end in their dimensions: N tokens, V logits, K targets of a token, W warpgroups, L lines, C the columns of a line.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from senano_jax.kernels import hopper_matmul

WARPGROUPS = 3  # 50,304 is 3 * 131 * 128
WARPS = 4  # of a warpgroup
LINE = 128  # logits
STEP = 12  # lines that a warpgroup works on at a time, a multiple of WARPS: 11 steps take 132
LOADS = 3  # of a third of a row, at most: the first walk begins when one of them is there
SHARED_MEMORY = 112 * 1024  # bytes of a block, so that a multiprocessor has room for two and their barriers
# A line for each warp, 4 neighbours in each thread: sums along a line stay within a warp.
LINES = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LINE), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
IN_EVERY_THREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((4,),)), warp_dims=(plgpu.Replicated(WARPS),), lane_dims=(plgpu.Replicated(32),), vector_dim=-1
)
LOG2_E = math.log2(math.e)


def runs_here() -> bool:
    """Whether the default device is a Hopper GPU, and JAX new enough to compile for it."""
    return hopper_matmul.runs_here()


def fits(logits: int, dtype, step: int = STEP) -> bool:
    """Whether the kernel takes rows of so many logits of this dtype, and a multiprocessor has room for two of them."""
    if dtype != jnp.bfloat16 or logits <= 0 or logits % (WARPGROUPS * LINE):
        return False
    return 2 * WARPGROUPS * _padded(logits // (WARPGROUPS * LINE), step) * LINE <= SHARED_MEMORY


def _padded(lines: int, step: int) -> int:
    return -(-lines // step) * step


@dataclass(frozen=True)
class Short:
    """Floats of 16 bits for numbers from 0 to 1/4, which need no sign and few exponents: all bits but `exponent_bits`
    are of the mantissa, so that they are rounded by 2^-11 or 2^-10 of their size; bfloat16 by 2^-8.

    Of a float32 number times 2^lift, whose exponent's first bits are therefore 0, they are the bits that come next.
    """

    exponent_bits: int

    @property
    def lift(self) -> int:
        """What is encoded, and decoded, has been multiplied by two to this power."""
        return 2**self.exponent_bits - 126

    @property
    def _zeros(self) -> int:
        return 9 - self.exponent_bits  # that float32 begins with

    def encode(self, x):
        """The float32 numbers rounded; as bfloat16, in whose place they are stored."""
        bits = lax.shift_left(lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(self._zeros)) + jnp.uint32(1 << 15)
        upper = lax.shift_right_logical(bits, jnp.uint32(16)).astype(jnp.uint16)
        return lax.bitcast_convert_type(upper, jnp.bfloat16)

    def decode(self, short):
        """The numbers that are stored, float32."""
        upper = lax.bitcast_convert_type(short, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(lax.shift_left(upper, jnp.uint32(16 - self._zeros)), jnp.float32)


def short_for(binary_cap: float) -> Short:
    """The most precise one in which 2^(binary_cap (s - 1)) s (1 - s) has all its bits, but for s < 2^-20."""
    return Short(6 if binary_cap <= 44 else 7)


@functools.partial(jax.jit, static_argnames=("cap", "slope", "shift", "step"))
def logsumexp_and_gradient(
    z_NV: Float[Array, "N V"],
    targets_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"] | None = None,
    *,
    cap: float,
    slope: float,
    shift: float = 0.0,
    step: int = STEP,
) -> tuple[Float[Array, "N"], Float[Array, "N V"]]:
    """What loss_kernel.logsumexp_and_gradient returns, `step` lines at a time. Raises ValueError if z does not fit."""
    tokens, logits = z_NV.shape
    if step % WARPS or not fits(logits, z_NV.dtype, step):
        raise ValueError(f"no Hopper kernel for rows of {logits} logits in {z_NV.dtype}, {step} lines at a time")
    lines = logits // (WARPGROUPS * LINE)
    padded = _padded(lines, step)
    load = -(-padded // (LOADS * step)) * step
    z_NWLC = z_NV.reshape(tokens, WARPGROUPS, lines, LINE)
    z_NK = jnp.take_along_axis(z_NV, targets_NK, axis=1).astype(jnp.float32)
    sigmoids_NK = jax.nn.sigmoid(slope * (z_NK + shift))
    # Changes none of them, but gives them a buffer of their own: XLA passes a slice of the tokens, which is what
    # targets are, as a pointer into them, and Mosaic refuses one that is not a multiple of 256 bytes.
    targets_NK = jnp.clip(targets_NK, 0, logits - 1)
    kernel = plgpu.kernel(
        functools.partial(_kernel, cap=cap, slope=slope, shift=shift, step=step, load=load),
        out_type=(jax.ShapeDtypeStruct((tokens,), jnp.float32), jax.ShapeDtypeStruct(z_NWLC.shape, z_NWLC.dtype)),
        scratch_types={
            "row_smem": plgpu.SMEM((WARPGROUPS, padded, LINE), z_NWLC.dtype),
            "sums_smem": plgpu.SMEM((WARPGROUPS * WARPS,), jnp.float32),
            "full": plgpu.Barrier(num_barriers=WARPGROUPS * LOADS),
            "summed": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid=(tokens,),
        grid_names=("token",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # no sum leaves its warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="loss_and_gradient",
    )
    logsumexp_N, dz_NWLC = kernel(z_NWLC, targets_NK, sigmoids_NK, weights_NK)
    return logsumexp_N, dz_NWLC.reshape(z_NV.shape)


def _kernel(
    z_gmem, targets_gmem, sigmoids_gmem, weights_gmem, logsumexp_gmem, dz_gmem, *,
    row_smem, sums_smem, full, summed, cap: float, slope: float, shift: float, step: int, load: int,
):  # fmt: skip
    token, warpgroup = lax.axis_index("token"), lax.axis_index("warpgroup")
    own_z, own_dz, own_smem = z_gmem.at[token, warpgroup], dz_gmem.at[token, warpgroup], row_smem.at[warpgroup]
    lines, padded = own_z.shape[0], own_smem.shape[0]
    binary_cap = cap * LOG2_E
    short = short_for(binary_cap)
    to_exponent = short.lift - binary_cap  # logits are below cap: exponentials are below 2^lift

    for n, first in enumerate(range(0, lines, load)):
        part = pl.ds(first, min(load, lines - first))
        plgpu.copy_gmem_to_smem(own_z.at[part], own_smem.at[part], full.at[warpgroup * LOADS + n])
    for line in range(lines, padded):  # that the last step takes beside the row's: logits of 0, left out of the sum
        own_smem[line] = jnp.full((LINE,), -jnp.inf, own_smem.dtype)

    # Read before they are needed: they come from far away.
    targets = range(targets_gmem.shape[1])
    target_K = [targets_gmem[token, k] for k in targets]
    sigmoid_K = [sigmoids_gmem[token, k] for k in targets]
    weight_K = [1.0 if weights_gmem is None else weights_gmem[token, k] for k in targets]

    def add(n, sum_LC):
        part = pl.ds(n * step, step)
        pl.when(lax.rem(n * step, load) == 0)(
            lambda: plgpu.barrier_wait(full.at[warpgroup * LOADS + lax.div(n * step, load)])
        )
        z_LC = plgpu.load(own_smem.at[part], layout=LINES).astype(jnp.float32)
        root_LC = lax.rsqrt(1 + jnp.exp2(z_LC * (-slope * LOG2_E) - shift * slope * LOG2_E))
        sigmoid_LC = root_LC * root_LC  # an approximate root takes one instruction, a division ten
        exp_LC = jnp.exp2(sigmoid_LC * binary_cap + to_exponent)
        own_smem[part] = short.encode(exp_LC * (sigmoid_LC - sigmoid_LC * sigmoid_LC))
        return sum_LC + exp_LC

    zero_LC = plgpu.layout_cast(jnp.zeros((step, LINE), jnp.float32), LINES)
    sum_LC = lax.fori_loop(0, padded // step, add, zero_LC)
    sum_LC = sum(sum_LC[first : first + WARPS] for first in range(0, step, WARPS))
    sums_smem[pl.ds(warpgroup * WARPS, WARPS)] = jnp.sum(sum_LC, axis=1)
    plgpu.barrier_arrive(summed)
    plgpu.barrier_wait(summed)
    of_padding = WARPGROUPS * (padded - lines) * LINE * 2.0**to_exponent
    total = jnp.sum(plgpu.load(sums_smem, layout=IN_EVERY_THREAD)) - of_padding

    @pl.when(warpgroup == 0)
    def write_sum():
        logsumexp_gmem[token] = (jnp.log2(total) - to_exponent) / LOG2_E

    weight, derivative = sum(weight_K), cap * slope
    factor = weight * derivative / total

    iota_LC = functools.partial(plgpu.broadcasted_iota, jnp.int32, (step, LINE), layout=LINES)
    column_LC = iota_LC(0) * LINE + iota_LC(1)

    def with_target(dz_LC, k, first_column):
        """The gradient at target k anew: its share of the softmax may be all but 1, and Short would lose the rest."""
        place = target_K[k] - first_column

        def replace(dz_LC):
            own_weight = sum(jnp.where(target == target_K[k], w, 0.0) for target, w in zip(target_K, weight_K))
            share = jnp.exp2(sigmoid_K[k] * binary_cap + to_exponent) / total
            dz = (share * weight - own_weight) * (sigmoid_K[k] * (1 - sigmoid_K[k]) * derivative)
            return jnp.where(column_LC == place, dz, dz_LC)

        return lax.cond((place >= 0) & (place < step * LINE), replace, lambda dz_LC: dz_LC, dz_LC)

    def pull_back(n, size):
        dz_LC = short.decode(plgpu.load(own_smem.at[pl.ds(n * step, step)], layout=LINES)) * factor
        for k in targets:
            dz_LC = with_target(dz_LC, k, (warpgroup * lines + n * step) * LINE)
        own_smem[pl.ds(n * step, step)] = dz_LC.astype(own_smem.dtype)
        plgpu.commit_smem()
        part = pl.ds(n * step, size)
        plgpu.copy_smem_to_gmem(own_smem.at[part], own_dz.at[part])

    lax.fori_loop(0, lines // step, lambda n, _: pull_back(n, step), None)
    if lines % step:
        pull_back(lines // step, lines % step)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes themselves end before the kernel does
