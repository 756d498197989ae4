"""Directions in which gradients are large shrink in Muon's direction before it is made orthogonal: Shampoo's
preconditioner on one side (Gupta et al., arXiv 1802.09568), in front of Muon's step. PMuon (modded-nanogpt, pull
request 285) has both sides there, by its code of the directions, to the power -0.3."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from senano_jax.optim.config import Whitening
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.stacks import Stack, StackRule

_RIDGE = 1e-3  # of the mean eigenvalue: smaller ones are treated alike
_LEAST = 1e-30
# Roots of eigenvalues from 0.00001 of the norm on end in 0.997 to 1.010 of what they should be. The ridge keeps them
# above 0.001 / rows of it, 1.3e-6 for 768 rows; there they end in 0.87 to 1.05.
_COEFFICIENTS = ITERATIONS["six-step"].coefficients


class WhiteningState(NamedTuple):
    """Of a stack of n matrices [rows, cols]."""

    moment: Float[Array, "n rows rows"]  # the second, of the gradients
    root: Float[Array, "n rows rows"]  # its inverse square root, as last computed


def whitened(rule: StackRule, whitening: Whitening) -> StackRule:
    """What `rule` makes of a stack, M [n, rows, cols] with rows <= cols, of gradients G, after

        C <- b C + (1 - b) G G^T                 (float32, from 0, not centred)
        M <- (C + 0.001 trace(C)/rows I)^(-1/2) M

    but for a factor of each matrix, which what is orthogonalised does not show. The root is computed anew at every
    `every`-th step. Of matrices [in, out], rows are the inputs of an MLP's first projection, the outputs of its second
    one and of two heads' queries or keys, the inputs of a square matrix. The columns of a wide matrix are left to
    NorMuon. On a GPU, G G^T and the product with M read their factors in TF32 where XLA does so by default.
    """

    def init(stack):
        n, rows, _ = stack.shape
        zeros = jnp.zeros((n, rows, rows), jnp.float32)
        return rule.init(stack), WhiteningState(zeros, zeros)

    def update(stack: Stack, kept: tuple[Any, WhiteningState], gradients: Stack, step: Int[Array, ""]):
        before, (moment, root) = kept
        g = gradients.astype(jnp.float32)
        moment = moment + (1 - whitening.decay) * (jnp.matmul(g, g.mT) - moment)
        is_due = step % whitening.every == 0
        root = jax.lax.cond(is_due, lambda c, _: inverse_root(c), lambda _, r: r, moment, root)
        white = jnp.matmul(root, stack.astype(jnp.float32)).astype(stack.dtype)
        stack, before = rule.update(white, before, gradients, step)
        return stack, (before, WhiteningState(moment, root))

    return StackRule(init, update, reads_gradients=True)


def inverse_root(moment: Float[Array, "n rows rows"]) -> Float[Array, "n rows rows"]:
    """The root in `whitened` of symmetric matrices C without negative eigenvalues, scaled to norm 1 with their ridge;
    of zeros, a multiple of the identity.

    Products alone, in float32: Z of Y <- Y P(ZY), Z <- P(ZY) Z from Y = C, Z = I, where x P(x^2) are the polynomials
    that make singular values 1 (Higham, Functions of Matrices, 6).
    """
    rows = moment.shape[-1]
    identity = jnp.eye(rows, dtype=jnp.float32)
    mean = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / rows
    c = moment / (mean + _LEAST) + _RIDGE * identity
    c = c / jnp.linalg.norm(c, axis=(-2, -1), keepdims=True)

    def step(state, coefficients):
        y, z = state
        a, b, d = coefficients
        m = _product(z, y)
        p = a * identity + b * m + d * _product(m, m)
        return (_product(y, p), _product(p, z)), None

    start = c, jnp.broadcast_to(identity, c.shape)
    (_, z), _ = jax.lax.scan(step, start, jnp.asarray(_COEFFICIENTS, jnp.float32))
    return z


def _product(a, b):
    """In float32 proper, also on a GPU: TF32's errors would grow by the root of the condition number."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
