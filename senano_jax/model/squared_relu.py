"""The MLP around relu(x)^2 (Primer, arXiv 2109.08668), and a version whose two elementwise passes ride on products.

The fused version keeps a = relu(x up)^2 alone for the backward pass, which needs relu(x up) once more: that is sqrt(a),
and rounded to bfloat16 it is the very number that was squared (tests/test_squared_relu.py tries them all).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.choice import Implementation


def squared_relu_mlp(
    x: Float[Array, "B T D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    implementation: Implementation = "auto",
) -> Float[Array, "B T D"]:
    """relu(x up)^2 down, rounded to x's type after every operation.

    `fused` needs a Hopper GPU, bfloat16 and sizes that hopper_matmul.fits; `auto` takes it wherever it can.
    """
    tokens = x.shape[0] * x.shape[1]
    automatic = implementation == "auto" and is_fused(tokens, *up.shape, x.dtype)
    if not automatic and implementation != "fused":  # where told to, the product itself refuses other sizes
        return jnp.square(nn.relu(x @ up)) @ down
    return _fused(x.reshape(tokens, -1), up, down).reshape(x.shape)


def is_fused(tokens: int, dim: int, hidden: int, dtype) -> bool:
    """Whether `auto` means `fused` for a product [tokens, dim] x [dim, hidden]."""
    return hopper_matmul.runs_here() and hopper_matmul.fits(tokens, dim, hidden, jnp.dtype(dtype))


def square_of_relu(x):
    """relu(x)^2, elementwise, in the type of x."""
    positive = jnp.maximum(x, jnp.zeros_like(x))
    return positive * positive


def gradient_of_square_of_relu(gradient, square):
    """The gradient of x, given those of square = relu(x)^2 and that number itself."""
    root = jnp.sqrt(square.astype(jnp.float32)).astype(square.dtype)
    return gradient * (root + root)


@jax.custom_vjp
def _fused(x_ND, up_DF, down_FD):
    return _fused_fwd(x_ND, up_DF, down_FD)[0]


def _fused_fwd(x_ND, up_DF, down_FD):
    a_NF = hopper_matmul.matmul(x_ND, up_DF, square_of_relu)
    return a_NF @ down_FD, (x_ND, a_NF, up_DF, down_FD)


def _fused_bwd(residuals, dy_ND):
    x_ND, a_NF, up_DF, down_FD = residuals
    dh_NF = hopper_matmul.matmul(dy_ND, down_FD.T, gradient_of_square_of_relu, a_NF)
    return dh_NF @ up_DF.T, x_ND.T @ dh_NF, a_NF.T @ dy_ND


_fused.defvjp(_fused_fwd, _fused_bwd)
