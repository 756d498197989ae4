"""What varies most among Muon's directions shrinks before the next one is made orthogonal: Shampoo's preconditioner on
one side (Gupta et al., arXiv 1802.09568), in front of Muon's step. PMuon (modded-nanogpt, pull request 285) has both
sides there, to the power -0.3."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.optim.config import Whitening
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.stacks import Stack, StackRule

_RIDGE = 1e-3  # of the mean eigenvalue: what varies less is treated alike
_LEAST = 1e-30
# Square roots from 0.003 of the norm on end in 0.997 to 1.010 of what they should be.
_COEFFICIENTS = ITERATIONS["six-step"].coefficients


class WhiteningState(NamedTuple):
    """Of a stack of n matrices [rows, cols]."""

    count: Int[Array, "n"]  # steps taken
    covariance: Float[Array, "n rows rows"]
    root: Float[Array, "n rows rows"]  # its inverse fourth root, as last computed


def whitened(rule: StackRule, whitening: Whitening) -> StackRule:
    """What `rule` makes of a stack, M [n, rows, cols] with rows <= cols, after

        C <- b C + (1 - b) M M^T           (float32, from 0)
        M <- (C + ridge)^(-1/4) M          (the root is computed anew at every `every`-th step)

    Of matrices [in, out], rows are the inputs of an MLP's first projection, the outputs of its second one and of two
    heads' queries or keys, the inputs of a square matrix. The columns of a wide matrix are left to NorMuon.
    """

    def init(stack):
        n, rows, _ = stack.shape
        zeros = jnp.zeros((n, rows, rows), jnp.float32)
        return rule.init(stack), WhiteningState(jnp.zeros(n, jnp.int32), zeros, zeros)

    def update(stack: Stack, kept: tuple[Any, WhiteningState]):
        before, (count, covariance, root) = kept
        x = stack.astype(jnp.float32)
        covariance = covariance + (1 - whitening.decay) * (jnp.matmul(x, x.mT) - covariance)
        root = jax.lax.cond(
            count[0] % whitening.every == 0, lambda c, _: inverse_fourth_root(c), lambda _, r: r, covariance, root
        )
        stack, before = rule.update(jnp.matmul(root, x).astype(stack.dtype), before)
        return stack, (before, WhiteningState(count + 1, covariance, root))

    return StackRule(init, update)


def inverse_fourth_root(covariance: Float[Array, "n rows rows"]) -> Float[Array, "n rows rows"]:
    """(C + ridge)^(-1/4) of symmetric matrices without negative eigenvalues, but for a factor of each matrix; of zeros,
    a multiple of the identity. Products alone, in float32."""
    rows = covariance.shape[-1]
    identity = jnp.eye(rows, dtype=jnp.float32)
    mean = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / rows
    c = covariance / (mean + _LEAST) + _RIDGE * identity
    c = c / jnp.linalg.norm(c, axis=(-2, -1), keepdims=True)
    root, _ = _square_roots(c)
    _, inverse = _square_roots(root)
    return inverse


def _square_roots(c: Float[Array, "n rows rows"]) -> tuple[Float[Array, "n rows rows"], Float[Array, "n rows rows"]]:
    """C^(1/2) and C^(-1/2) of matrices whose eigenvalues are in 0 to 1: Y and Z of Y <- Y P(ZY), Z <- P(ZY) Z from
    Y = C, Z = I, where x P(x^2) are the polynomials that make singular values 1 (Higham, Functions of Matrices, 6)."""

    def step(state, coefficients):
        y, z = state
        a, b, d = coefficients
        m = _product(z, y)
        p = a * identity + b * m + d * _product(m, m)
        return (_product(y, p), _product(p, z)), None

    identity = jnp.eye(c.shape[-1], dtype=jnp.float32)
    start = c, jnp.broadcast_to(identity, c.shape)
    (y, z), _ = jax.lax.scan(step, start, jnp.asarray(_COEFFICIENTS, jnp.float32))
    return y, z


def _product(a, b):
    """In float32 proper, also on a GPU: TF32's errors would grow by the root of the condition number."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
