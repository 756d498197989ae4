"""Newton-Schulz orthogonalisation, as Muon uses it (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# A quintic whose slope at zero is as steep as possible: singular values end near 1 (0.7 to 1.2), not at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrices: Float[Array, "*stack rows cols"]) -> Float[Array, "*stack rows cols"]:
    """Brings the singular values of each matrix near 1 and keeps its singular vectors; bfloat16 with float32 sums.

    X = M / ||M||_F, then five times A = X X^T, X = a X + (b A + c A A) X. A zero matrix stays zero.
    Fastest for rows <= cols, which makes A the smaller Gram matrix; any shape is correct.
    """
    a, b, c = COEFFICIENTS
    x = matrices.astype(jnp.float32)
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(jnp.bfloat16)
    for _ in range(STEPS):
        gram = _matmul(x, x.mT).astype(jnp.bfloat16)
        polynomial = (b * gram.astype(jnp.float32) + c * _matmul(gram, gram)).astype(jnp.bfloat16)
        x = (a * x.astype(jnp.float32) + _matmul(polynomial, x)).astype(jnp.bfloat16)
    return x


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
