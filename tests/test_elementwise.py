"""Sums that are rounded once, rows of a table, and what their gradients add up to."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax.model.elementwise import columns_as_rows, rows_of, weighted_sum


def test_a_weighted_sum_is_rounded_once():
    """It and its gradients, against float64: every entry is the bfloat16 number next to the exact one."""
    weights = (1.003, 0.997, 0.1)
    xs = [256 * jax.random.normal(jax.random.key(k), (4096,)).astype(jnp.bfloat16) for k in range(3)]
    cotangent = jax.random.normal(jax.random.key(3), (4096,)).astype(jnp.bfloat16)
    total, pull_back = jax.vjp(
        lambda weights, xs: weighted_sum(*zip(weights, xs), dtype=jnp.bfloat16), [jnp.float32(w) for w in weights], xs
    )
    d_weights, d_xs = pull_back(cotangent)

    exact = sum(float(np.float32(w)) * np.asarray(x, np.float64) for w, x in zip(weights, xs))
    # The float32 sum may fall on the other side of the middle between two bfloat16 numbers, which is rare.
    np.testing.assert_allclose(np.asarray(total, np.float64), exact, rtol=2**-8)
    assert np.mean(total == exact.astype(jnp.bfloat16)) > 0.999
    for weight, d_weight, x, d_x in zip(weights, d_weights, xs, d_xs):
        np.testing.assert_array_equal(d_x, (np.float32(weight) * cotangent.astype(jnp.float32)).astype(jnp.bfloat16))
        products = np.asarray(cotangent, np.float64) * np.asarray(x, np.float64)
        np.testing.assert_allclose(d_weight, products.sum(), rtol=0, atol=1e-5 * np.abs(products).sum())


def test_rows():
    table = jax.random.normal(jax.random.key(0), (5, 3)).astype(jnp.bfloat16)
    rows = rows_of(table, jnp.array([[4, 0], [2, 2]]), jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, np.asarray(table)[[[4, 0], [2, 2]]])


def test_a_token_that_occurs_often_keeps_its_gradient():
    """Of 5,000 ones, a sum in bfloat16 gets to 256."""
    inputs = jnp.where(jnp.arange(5000) < 4000, 1, 2)
    table = jnp.zeros((4, 2), jnp.bfloat16)
    gradient = jax.grad(lambda table: rows_of(table, inputs, jnp.bfloat16).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    expected = jnp.array([[0, 0], [4000, 4000], [1000, 1000], [0, 0]], jnp.bfloat16)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["operation by operation", "compiled"])
def test_columns_as_rows(transform):
    """The same numbers and gradients, to the bit, as those of the columns."""
    matrix = jax.random.normal(jax.random.key(0), (8, 5))
    inputs = jnp.array([[4, 0, 4], [2, 2, 2]])
    weights = jax.random.normal(jax.random.key(1), (2, 3, 8))

    def loss(matrix, rows):
        return jnp.sum(weights * jnp.tanh(rows(matrix)[inputs])) + jnp.sum(matrix**2)

    results = (
        transform(jax.value_and_grad(functools.partial(loss, rows=rows)))(matrix)
        for rows in (columns_as_rows, jnp.transpose)
    )
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_columns_as_rows_are_stored_row_by_row():
    """On their way out of the matrix and on that of the gradient back."""
    gradient = jax.grad(lambda matrix: jnp.sum(columns_as_rows(matrix)[jnp.array([3, 1, 3])] ** 2))
    program = jax.jit(gradient).lower(jnp.ones((8, 5))).as_text()
    stored = re.findall(r"@LayoutConstraint.*result_layouts = \[dense<(.*?)> .*-> tensor<(\w+)>", program)
    assert Counter(stored) == {("[1, 0]", "8x5xf32"): 2, ("[1, 0]", "5x8xf32"): 2}
