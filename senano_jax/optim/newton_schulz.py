"""Orthogonalisation of matrices by iterated polynomials of odd degree, as Muon and its successors use it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Iteration(NamedTuple):
    """X = M / (margin ||M||_F + epsilon), then X = a X + (b A + c A A) X with A = X X^T for each (a, b, c)."""

    coefficients: tuple[tuple[float, float, float], ...]
    margin: float = 1.0
    epsilon: float = 1e-7
    scaled: bool = False
    """Whether Y = X / s is iterated, s growing by a in each step: Y + P Y is one product on a GPU, where its sums begin
    with Y. The bits are others than those of a X + P X, the errors as large there."""


ITERATIONS = {
    # A quintic whose slope at zero is as steep as possible: singular values end near 1 (0.7 to 1.2), not at 1
    # (Jordan et al., 2024, kellerjordan.github.io/posts/muon).
    "newton-schulz": Iteration(((3.4445, -4.7750, 2.0315),) * 5),
    # Polar Express (Amsel et al., arXiv 2505.16932): each step the best for what the one before has left, so that
    # singular values from 0.001 of the norm on end in 0.86 to 1.14. Constants: modded-nanogpt.
    "polar-express": Iteration(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
        epsilon=1e-6,
        scaled=True,
    ),
    # A step more for a flatter end: from 0.003 of the norm on, 0.997 to 1.010. Constants: modded-nanogpt, pull request
    # 349.
    "six-step": Iteration(
        (
            (4.447393659248992, -8.6592834371539, 4.484453950130224),
            (3.0003381342927278, -3.180035633097396, 0.959298544318381),
            (3.5997737315685896, -5.129961939372116, 1.94624091228252),
            (3.238755176943844, -3.988313284248892, 1.4073635628857994),
            (2.558664852492382, -2.5626431459988033, 0.9815933969681315),
            (2.38665846260798, -2.223181615281231, 0.835162681686761),
        ),
        margin=1.02,
        epsilon=1e-6,
        scaled=True,
    ),
}


def orthogonalize(
    matrices: Float[Array, "*stack rows cols"],
    iteration: Iteration = ITERATIONS["newton-schulz"],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "*stack rows cols"]:
    """Brings the singular values of each matrix near 1 and keeps its singular vectors; sums in float32, all that lies
    between two products in `dtype`, the result too.

    A zero matrix stays zero. Fastest for rows <= cols, which makes A the smaller Gram matrix; any shape is correct.
    """
    x = matrices.astype(dtype if iteration.scaled else jnp.float32)
    norm = iteration.margin * jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    divisor = norm + iteration.epsilon
    coefficients = jnp.asarray(iteration.coefficients, jnp.float32)
    if not iteration.scaled:
        # A loop: fewer programs to compile, and what a step begins with is in `dtype` and nothing else.
        x, _ = jax.lax.scan(_step, (x / divisor).astype(dtype), coefficients)
        return x
    # A loop would copy y, which its product reads, to the place where the product's sums begin with it.
    (y, scale), _ = jax.lax.scan(_scaled_step, (x, 1 / divisor), coefficients, unroll=True)
    return (scale * y.astype(jnp.float32)).astype(dtype)


def _step(x, coefficients):
    (a, b, c), dtype = coefficients, x.dtype
    gram = _matmul(x, x.mT).astype(dtype)
    polynomial = (b * gram.astype(jnp.float32) + c * _matmul(gram, gram)).astype(dtype)
    return (a * x.astype(jnp.float32) + _matmul(polynomial, x)).astype(dtype), None


def _scaled_step(state, coefficients):
    (y, scale), (a, b, c), dtype = state, coefficients, state[0].dtype
    gram = (scale * scale * _matmul(y, y.mT)).astype(dtype)
    polynomial = (b / a * gram.astype(jnp.float32) + c / a * _matmul(gram, gram)).astype(dtype)
    # The product in `dtype`: so XLA makes the sum a part of it on a GPU, and rounds that alone. A CPU rounds both.
    return (y + jnp.matmul(polynomial, y, preferred_element_type=dtype), a * scale), None


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
