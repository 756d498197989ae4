"""Programs that hold whole rows of an array [B, T, D], in parts whose width is a power of two.

Names end in their dimensions: R the rows of a program, P a part of a row.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from senano_jax.kernels import triton

MOST_PARTS = 8  # of a row, all of which a program holds


def fits(shape: tuple[int, int, int], launch: triton.RowLaunch) -> bool:
    """Whether programs of this launch can hold whole rows of [B, T, D]."""
    batch, length, width = shape
    part = width & -width  # the largest power of two that divides it
    return triton.fits(part) and width // part <= MOST_PARTS and batch * length % launch.rows == 0


def parts_of(width: int) -> list[pl.Slice]:
    """Places of the parts of a row, whose width is the largest power of two that divides its own."""
    size = width & -width
    return [pl.ds(start, size) for start in range(0, width, size)]


def mean(a, b):
    """[R, 1]: the mean of a b over the parts of each row."""
    product_RP = sum(a_RP * b_RP for a_RP, b_RP in zip(a, b))
    return (jnp.sum(product_RP, axis=1) / (len(a) * product_RP.shape[1]))[:, None]


def dot(a, b):
    """The sum of a b over all parts of all rows."""
    return jnp.sum(sum(a_RP * b_RP for a_RP, b_RP in zip(a, b)))


def norm_gradient(x, dy, epsilon: float):
    """dx of y = s x with s = (mean(x^2) + epsilon)^(-1/2): s dy - s^3 mean(x dy) x, part by part."""
    scale_R1 = lax.rsqrt(mean(x, x) + epsilon)
    along_R1 = scale_R1 * scale_R1 * mean(x, dy)
    return [scale_R1 * (dy_RP - along_R1 * x_RP) for x_RP, dy_RP in zip(x, dy)]
