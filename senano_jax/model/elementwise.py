"""Small functions that several parts of the model share."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

# PyTorch's rms_norm takes the float32 epsilon for bfloat16 inputs too.
NORM_EPSILON = 1.1920929e-7


def norm(x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a gain; computed in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


def weighted_sum(*terms: tuple[Float[Array, ""], Float[Array, "*S"]], dtype: jnp.dtype) -> Float[Array, "*S"]:
    """The sum of weight * x over (weight, x), computed in float32 and rounded once, to `dtype`.

    With weights near 1 the roundings of single products are no noise: all numbers of one mantissa err the same way, and
    over many layers the residual stream drifts. PyTorch rounds once too when it compiles such a sum.
    """
    return sum(weight * x.astype(jnp.float32) for weight, x in terms).astype(dtype)


def columns_as_rows(matrix: Float[Array, "D V"]) -> Float[Array, "V D"]:
    """The transpose, stored row by row, and so its gradient.

    Left to itself XLA stores neither: rows are strided columns, of which a gather and a scatter touch a line of memory
    for each number. Without the barrier it would still scatter into the matrix.
    """
    by_rows = Layout(major_to_minor=(0, 1))
    rows = with_layout_constraint(with_layout_constraint(matrix, by_rows).T, by_rows)
    return lax.optimization_barrier(rows)


def rows_of(table: Float[Array, "V D"], indices: Int[Array, "*S"], dtype: jnp.dtype) -> Float[Array, "*S D"]:
    """Rows of `table` in `dtype`; their gradients are added in float32 whatever the table's type.

    A sum in bfloat16 stands still at 256 times what is added, so that the commonest tokens would lose much of theirs.
    """
    return table.astype(jnp.float32)[indices].astype(dtype)
