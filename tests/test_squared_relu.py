"""The MLP: its formula, and the gradient that finds relu(x) again in relu(x)^2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax.kernels import hopper_matmul
from senano_jax.model.squared_relu import gradient_of_square_of_relu, square_of_relu, squared_relu_mlp


def inputs(tokens, dim, hidden, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, tokens // 2, dim), (dim, hidden), (hidden, dim), (2, tokens // 2, dim))
    x, up, down, dy = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))
    return (x, up / dim**0.5, down / hidden**0.5), dy


def value_and_gradients(implementation, arguments, dy):
    y, pullback = jax.vjp(lambda *a: squared_relu_mlp(*a, implementation), *arguments)
    return y, *pullback(dy)


def test_the_formula():
    """Against float64 NumPy."""
    arguments, _ = inputs(16, 8, 32, jnp.float32)
    x, up, down = (np.asarray(a, np.float64) for a in arguments)
    np.testing.assert_allclose(squared_relu_mlp(*arguments), np.maximum(x @ up, 0) ** 2 @ down, rtol=1e-4, atol=1e-5)


def test_the_root_of_the_square_is_what_was_squared():
    """Of every bfloat16 number whose square is a normal one, infinity aside."""
    x = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    square = square_of_relu(x)
    usable = np.isfinite(np.asarray(square, np.float32)) & (np.asarray(square, np.float32) > 2.0**-126)
    slope = gradient_of_square_of_relu(jnp.ones_like(x), square)
    assert usable.sum() > 16_000  # a quarter of all: half of the positive ones
    np.testing.assert_array_equal(np.asarray(slope)[usable], np.asarray(2 * x)[usable])


def test_nothing_flows_where_nothing_was_active():
    x = jnp.array([-3.0, -0.0, 0.0], jnp.bfloat16)
    assert not gradient_of_square_of_relu(jnp.ones_like(x), square_of_relu(x)).any()


def test_fused_gradients(monkeypatch):
    """The rule around the kernel: with products of the same roundings it gives what automatic differentiation gives."""
    monkeypatch.setattr(hopper_matmul, "matmul", lambda a, b, epilogue, *side: epilogue(a @ b, *side))
    arguments, dy = inputs(32, 16, 64, jnp.bfloat16)
    results, expected = (value_and_gradients(name, arguments, dy) for name in ("fused", "plain"))
    for result, reference in zip(results, expected):
        assert result.dtype == reference.dtype
        np.testing.assert_allclose(
            np.asarray(result, np.float32), np.asarray(reference, np.float32), rtol=2e-2, atol=2e-3
        )


@pytest.mark.gpu
def test_fused_on_a_gpu():
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    arguments, dy = inputs(4096, 768, 3072, jnp.bfloat16)
    results, expected = (
        jax.jit(value_and_gradients, static_argnums=0)(name, arguments, dy) for name in ("fused", "plain")
    )
    for result, reference in zip(results, expected):
        result, reference = (np.asarray(a, np.float64) for a in (result, reference))
        assert np.linalg.norm(result - reference) <= 2e-3 * np.linalg.norm(reference)
