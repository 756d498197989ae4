"""The stream beside its norm: on a CPU the fused backward pass runs interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import norm

from senano_jax.kernels.triton import RowLaunch
from senano_jax.model.norm_fork import norm_fork


def random(seed, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [3 * jax.random.normal(key, (2, 8, width), dtype) for key in keys]


def gradient(implementation, x, dx, dy, **options):
    _, pullback = jax.vjp(lambda x: norm_fork(x, None, implementation, **options), x)
    return pullback((dx, dy))[0]


def test_both_outputs():
    x, _, _ = random(0, 48)
    for implementation in ("plain", "fused"):
        same, normed = norm_fork(x, None, implementation)
        np.testing.assert_array_equal(same, x)
        np.testing.assert_allclose(normed, norm(np.asarray(x, np.float64)), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
def test_a_sum_is_not_rounded_and_has_the_gradients_of_its_terms(implementation):
    """bfloat16 terms of which one is too small for the other's digits. The gradients are those of float32, rounded."""
    x, dx, dy = (array.astype(jnp.bfloat16) for array in random(4, 96))
    added = (x[::-1] / 2048).astype(jnp.bfloat16)
    (total, normed), pullback = jax.vjp(lambda *terms: norm_fork(*terms, implementation), x, added)
    exact = x.astype(jnp.float32) + added.astype(jnp.float32)
    assert np.any(exact != exact.astype(jnp.bfloat16)) and normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total, exact)
    np.testing.assert_allclose(normed.astype(jnp.float32), norm(np.asarray(exact, np.float64)), rtol=2**-8)
    to_x, to_added = pullback((dx.astype(jnp.float32), dy))
    assert to_x.dtype == to_added.dtype == jnp.bfloat16
    expected = gradient("plain", exact, dx.astype(jnp.float32), dy.astype(jnp.float32))
    for found in (to_x, to_added):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-7, atol=1e-3)


def test_a_float32_gradient_is_rounded_with_what_is_added_to_it_and_not_before():
    """Else what a layer adds to the gradient is lost where it is less than half of the last digit: it errs by up to a
    whole digit then, and for all tokens the same way where the gradient comes from a product with one weight."""
    x, _, dy = (array.astype(jnp.bfloat16) for array in random(5, 96))
    dx = 1.03 * random(6, 96)[0].astype(jnp.bfloat16).astype(jnp.float32)
    exact = gradient("plain", x.astype(jnp.float32), dx, dy.astype(jnp.float32))
    _, pullback = jax.vjp(lambda x, added: norm_fork(x, added, "fused"), x, jnp.zeros_like(x))
    found = pullback((dx, dy))[0]
    half_a_digit = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(exact))) - 8)
    assert jnp.max(jnp.abs(found.astype(jnp.float32) - exact) / half_a_digit) < 1.01


def test_a_gradient_that_was_rounded_is_read_in_its_type():
    """Told that it was, the kernel rounds what comes in as float32: it gives the same as for numbers that need none."""
    x, _, dy = (array.astype(jnp.bfloat16) for array in random(5, 96))
    dx = 1.03 * random(6, 96)[0]

    def gradient(dx, rounded_gradient):
        fork = functools.partial(norm_fork, implementation="fused", rounded_gradient=rounded_gradient)
        return jax.vjp(lambda x: fork(x, x / 16), x)[1]((dx, dy))[0]

    np.testing.assert_array_equal(gradient(dx, True), gradient(dx.astype(jnp.bfloat16).astype(jnp.float32), False))
    assert np.any(gradient(dx, True) != gradient(dx, False))


@pytest.mark.parametrize("width", [32, 96, 768])  # one part, three narrow ones, three wide ones
def test_gradient(width):
    x, dx, dy = random(1, width)
    expected = gradient("plain", x, dx, dy)
    np.testing.assert_allclose(gradient("fused", x, dx, dy), expected, rtol=1e-4, atol=1e-5)
    small = RowLaunch(rows=2, warps=1)
    np.testing.assert_allclose(gradient("fused", x, dx, dy, launch=small), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_have_finite_gradients():
    x, dx, dy = (0 * a for a in random(2, 32)[:1]), *random(2, 32)[1:]
    np.testing.assert_allclose(gradient("fused", next(x), dx, dy), dx + dy / 1.1920929e-7**0.5, rtol=1e-5)


def test_refuses_rows_it_cannot_hold():
    with pytest.raises(ValueError, match="no fused kernel"):
        norm_fork(jnp.ones((1, 8, 24)), None, "fused")  # parts of 8
    with pytest.raises(ValueError, match="no fused kernel"):
        norm_fork(jnp.ones((1, 3, 32)), None, "fused")  # 3 rows for programs of 4


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize(("width", "apart"), [(32, 12), (96, 12), (96, 40), (768, 12)])  # of one part and of two
def test_first_channels_apart(width, apart, implementation):
    """They are those of the norm, and their gradient is that of a slice."""
    x, dx, dy = random(7, width)
    d_first = dy[::-1, :, :apart]
    (_, normed, first), pullback = jax.vjp(lambda x: norm_fork(x, None, implementation, apart=apart), x)
    np.testing.assert_array_equal(first, normed[..., :apart])
    expected = gradient("plain", x, dx, dy.at[..., :apart].add(d_first))
    np.testing.assert_allclose(pullback((dx, dy, d_first))[0], expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_channels_apart_is_not_rounded_into_the_norm_s():
    """bfloat16: added to the other one in float32, where it is less than half of its last digit."""
    x, dx, dy = (array.astype(jnp.bfloat16) for array in random(8, 96))
    d_first = (dy[..., :12] / 512).astype(jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: norm_fork(x, None, "fused", apart=12), x)
    exact = [array.astype(jnp.float32) for array in (x, dx, dy)]
    exact[2] = exact[2].at[..., :12].add(d_first.astype(jnp.float32))
    expected = gradient("plain", *exact)
    np.testing.assert_allclose(pullback((dx, dy, d_first))[0].astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("apart", [None, 12])
def test_lowers_for_cuda(apart):
    """The kernel passes through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    x = jax.ShapeDtypeStruct((2, 16_384, 768), jnp.bfloat16)

    @jax.jit
    def value_and_gradient(x):
        value, pull_back = jax.vjp(lambda x: norm_fork(x, None, "fused", apart=apart, interpret=False), x)
        return value, pull_back(value)

    lowered = value_and_gradient.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("apart", [None, 12])
def test_gradient_on_a_gpu(terms, apart):
    x, dx, dy = random(3, 768, jnp.bfloat16)
    d_first = () if apart is None else (dy[::-1, :, :apart],)
    added = x[::-1] / 16 if terms == 2 else None
    dx = dx if added is None else dx.astype(jnp.float32)

    def gradient(implementation, x):
        return jax.vjp(lambda x: norm_fork(x, added, implementation, apart=apart), x)[1]((dx, dy, *d_first))[0]

    result, expected = (
        np.asarray(jax.jit(gradient, static_argnums=0)(name, x), np.float64) for name in ("fused", "plain")
    )
    assert np.linalg.norm(result - expected) <= 5e-3 * np.linalg.norm(expected)
