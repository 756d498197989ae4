"""Rows of a table, and what their gradients add up to."""

import jax
import jax.numpy as jnp
import numpy as np

from senano_jax.model.elementwise import rows_of


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
