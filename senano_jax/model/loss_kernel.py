"""Log-sum-exp of soft-capped logits and the loss's gradient, in one Pallas kernel for NVIDIA GPUs.

Three exponentials or reciprocals a logit in each of two passes take longer than the memory traffic, so the kernel uses
the hardware's approximate ones (2 ulp), which XLA does not. A program owns R tokens and walks twice over their V
logits, C columns at a time. The tokens that a row of logits predicts, K of them, are found by comparing numbers of
columns, so that the second walk serves them all. Hopper GPUs have a kernel of their own, hopper_loss.py.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from senano_jax.kernels import triton
from senano_jax.model import hopper_loss

Implementation = Literal["auto", "hopper", "triton"]
COLUMNS = 128


DEFAULT_LAUNCH = triton.RowLaunch(rows=4, warps=4)


def fits(tokens: int, logits: int, launch: triton.RowLaunch = DEFAULT_LAUNCH) -> bool:
    """Whether the kernel takes so many tokens and logits a token."""
    return tokens % launch.rows == 0 and logits % COLUMNS == 0


@functools.partial(jax.jit, static_argnames=("cap", "slope", "shift", "implementation", "launch", "interpret"))
def logsumexp_and_gradient(
    z: Float[Array, "N V"],
    targets: Int[Array, "N K"],
    weights: Float[Array, "N K"] | None = None,
    *,
    cap: float,
    slope: float,
    shift: float = 0.0,
    implementation: Implementation = "auto",
    launch: triton.RowLaunch = DEFAULT_LAUNCH,
    interpret: bool = False,
) -> tuple[Float[Array, "N"], Float[Array, "N V"]]:
    """For logits = cap * sigmoid(slope * (z + shift)): their log-sum-exp (float32) and the gradient of z, in its type,
    of the sum of a token's K cross-entropies, weighted by float32 numbers; None: K is 1, and the weight 1.

    `hopper` is for Hopper GPUs, ValueError for z that hopper_loss does not fit; `auto` takes it wherever it can.
    `launch` and `interpret` are for `triton`.
    """
    tokens, logits = z.shape
    automatic = not interpret and hopper_loss.runs_here() and hopper_loss.fits(logits, z.dtype)
    if implementation == "hopper" or (implementation == "auto" and automatic):
        return hopper_loss.logsumexp_and_gradient(z, targets, weights, cap=cap, slope=slope, shift=shift)
    rows = pl.BlockSpec((launch.rows, logits), lambda n: (n, 0))
    of_token = pl.BlockSpec((launch.rows,), lambda n: (n,))
    asked = pl.BlockSpec((launch.rows, targets.shape[1]), lambda n: (n, 0))
    return triton.call(
        functools.partial(_kernel, cap=cap, slope=slope, shift=shift, interpret=interpret),
        name="loss_and_gradient",
        grid=(tokens // launch.rows,),
        in_specs=[rows, asked, None if weights is None else asked],
        out_specs=[of_token, rows],
        out_shape=[jax.ShapeDtypeStruct((tokens,), jnp.float32), jax.ShapeDtypeStruct(z.shape, z.dtype)],
        launch=launch,
        interpret=interpret,
    )(z, targets, weights)


def _kernel(
    z_ref,
    targets_ref,
    weights_ref,
    logsumexp_ref,
    dz_ref,
    *,
    cap: float,
    slope: float,
    shift: float,
    interpret: bool,
):
    exp2, reciprocal = triton.scaled_exp2(interpret), triton.reciprocal(interpret)
    tokens, logits = z_ref.shape
    binary_cap = cap * math.log2(math.e)

    def sigmoid(c):
        z_RC = z_ref[:, pl.ds(c * COLUMNS, COLUMNS)].astype(jnp.float32)
        return reciprocal(1 + exp2(z_RC, -slope * math.log2(math.e), shift * slope * math.log2(math.e)))

    def add(c, sum_RC):
        # Logits lie in (0, cap), so exp cannot overflow.
        return sum_RC + exp2(sigmoid(c), binary_cap, 0.0)

    sum_RC = lax.fori_loop(0, logits // COLUMNS, add, jnp.zeros((tokens, COLUMNS), jnp.float32))
    binary_R = jnp.log2(jnp.sum(sum_RC, axis=1))
    logsumexp_ref[...] = binary_R * math.log(2)
    count = targets_ref.shape[1]
    targets_R1 = [targets_ref[:, k][:, None] for k in range(count)]
    if weights_ref is not None:
        weights_R1 = [weights_ref[:, k][:, None] for k in range(count)]
        total_R1 = sum(weights_R1)

    def pull_back(c, carry):
        sigmoid_RC = sigmoid(c)
        share_RC = exp2(sigmoid_RC, binary_cap, binary_R[:, None])
        column_RC = c * COLUMNS + lax.broadcasted_iota(jnp.int32, (tokens, COLUMNS), 1)
        if weights_ref is None:
            d_logit_RC = share_RC - (column_RC == targets_R1[0]).astype(jnp.float32)
        else:
            d_logit_RC = share_RC * total_R1
            for target_R1, weight_R1 in zip(targets_R1, weights_R1):
                d_logit_RC -= jnp.where(column_RC == target_R1, weight_R1, 0.0)
        dz_RC = d_logit_RC * (sigmoid_RC * (1 - sigmoid_RC) * (cap * slope))
        dz_ref[:, pl.ds(c * COLUMNS, COLUMNS)] = dz_RC.astype(dz_ref.dtype)
        return carry

    lax.fori_loop(0, logits // COLUMNS, pull_back, None)
