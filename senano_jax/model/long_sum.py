"""Products of rows whose sums have so many terms that a tensor core loses some of what is small.

A tensor core shifts a few terms at a time, and the sum so far, to the largest exponent among them, and cuts off the
bits below float32's (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7, 2021). The
gradient that the head hands to the model adds up one large term and tens of thousands of small ones for each token.
What is cut off of them points the same way for all tokens, so that it adds up in the gradients of the weights.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_TERMS = 4224  # that are added up before a sum starts anew: 50,304 in 12 parts
_ALIGNED = 8  # bfloat16 numbers in the 16 bytes that cuBLAS wants a row to begin at


def parts_of(terms: int) -> int:
    """The fewest equal parts of a sum that have MOST_TERMS at most, or 1 if cuBLAS would not take them in place or they
    would be twice as many as those have to be: the parts are stored."""
    fewest = -(-terms // MOST_TERMS)
    return next((n for n in range(fewest, 2 * fewest) if terms % (n * _ALIGNED) == 0), 1)


def rows_product(a_NV: Float[Array, "N V"], b_DV: Float[Array, "D V"], parts: int) -> Float[Array, "N D"]:
    """a b^T in a's type, of sums in `parts` equal parts that are each added up in float32, and together then.

    cuBLAS reads the parts where they are; they are stored in float32, [parts, N, D], until they are added up.
    """
    a_NPV, b_DPV = (rows.reshape(rows.shape[0], parts, -1) for rows in (a_NV, b_DV))
    sums_PND = jnp.einsum("npv,dpv->pnd", a_NPV, b_DPV, preferred_element_type=jnp.float32)
    return sums_PND.sum(0).astype(a_NV.dtype)
