"""Log-sum-exp of soft-capped logits and the loss's gradient, in one Pallas kernel for NVIDIA GPUs.

Three exponentials or reciprocals a logit in each of two passes take longer than the memory traffic, so the kernel uses
the hardware's approximate ones (2 ulp), which XLA does not. A program owns R tokens and walks twice over their V
logits, C columns at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from senano_jax.kernels import triton

COLUMNS = 128


DEFAULT_LAUNCH = triton.RowLaunch(rows=4, warps=4)


def fits(tokens: int, logits: int, launch: triton.RowLaunch = DEFAULT_LAUNCH) -> bool:
    return tokens % launch.rows == 0 and logits % COLUMNS == 0


@functools.partial(jax.jit, static_argnames=("cap", "slope", "shift", "launch", "interpret"))
def logsumexp_and_gradient(
    z: Float[Array, "N V"],
    targets: Int[Array, "N"],
    *,
    cap: float,
    slope: float,
    shift: float = 0.0,
    launch: triton.RowLaunch = DEFAULT_LAUNCH,
    interpret: bool = False,
) -> tuple[Float[Array, "N"], Float[Array, "N V"]]:
    """For logits = cap * sigmoid(slope * (z + shift)): their log-sum-exp (float32) and the cross-entropy's gradient of
    z."""
    tokens, logits = z.shape
    rows = pl.BlockSpec((launch.rows, logits), lambda n: (n, 0))
    of_token = pl.BlockSpec((launch.rows,), lambda n: (n,))
    return triton.call(
        functools.partial(_kernel, cap=cap, slope=slope, shift=shift, interpret=interpret),
        name="loss_and_gradient",
        grid=(tokens // launch.rows,),
        in_specs=[rows, of_token],
        out_specs=[of_token, rows],
        out_shape=[jax.ShapeDtypeStruct((tokens,), jnp.float32), jax.ShapeDtypeStruct(z.shape, z.dtype)],
        launch=launch,
        interpret=interpret,
    )(z, targets)


def _kernel(z_ref, target_ref, logsumexp_ref, dz_ref, *, cap: float, slope: float, shift: float, interpret: bool):
    exp2, reciprocal = triton.scaled_exp2(interpret), triton.reciprocal(interpret)
    tokens, logits = z_ref.shape
    binary_cap = cap * math.log2(math.e)

    def sigmoid(start):
        z_RC = z_ref[:, pl.ds(start, COLUMNS)].astype(jnp.float32)
        return reciprocal(1 + exp2(z_RC, -slope * math.log2(math.e), shift * slope * math.log2(math.e)))

    def add(c, sum_RC):
        # Logits lie in (0, cap), so exp cannot overflow.
        return sum_RC + exp2(sigmoid(c * COLUMNS), binary_cap, 0.0)

    sum_RC = lax.fori_loop(0, logits // COLUMNS, add, jnp.zeros((tokens, COLUMNS), jnp.float32))
    binary_R = jnp.log2(jnp.sum(sum_RC, axis=1))
    logsumexp_ref[...] = binary_R * math.log(2)
    target_R1 = target_ref[...][:, None]

    def pull_back(c, carry):
        sigmoid_RC = sigmoid(c * COLUMNS)
        share_RC = exp2(sigmoid_RC, binary_cap, binary_R[:, None])
        column_RC = c * COLUMNS + lax.broadcasted_iota(jnp.int32, (tokens, COLUMNS), 1)
        d_logit_RC = share_RC - (column_RC == target_R1).astype(jnp.float32)
        dz_RC = d_logit_RC * (sigmoid_RC * (1 - sigmoid_RC) * (cap * slope))
        dz_ref[:, pl.ds(c * COLUMNS, COLUMNS)] = dz_RC.astype(dz_ref.dtype)
        return carry

    lax.fori_loop(0, logits // COLUMNS, pull_back, None)
