"""Attention: the dense one against a loop over queries, the banded one against the dense one, isolation, memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import END_OF_TEXT, random_tokens, relative_error, softmax_attention, visible_pairs
from tiny import abstract_params, tiny_gpt2, tiny_model

from senano_jax.attention import attend, document_start, window_intervals

SCALE = 0.12
LENGTH = 512


def inputs(seed: int, batch=2, length=LENGTH, heads=2, width=16, dtype=jnp.float32):
    """q, k, v and a cotangent of the output; scores spread over several units, so that the softmax is not flat."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(3 * rng.standard_normal((batch, length, heads, width)), dtype) for _ in range(4)]


@functools.partial(jax.jit, static_argnums=6)
def value_and_gradients(q, k, v, d_out, tokens, window_blocks, implementation):
    intervals = window_intervals(document_start(tokens), window_blocks)
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, intervals, SCALE, implementation), q, k, v)
    return out, *pullback(d_out)


@pytest.mark.parametrize(("documents", "window_blocks"), [(0.0, 1), (0.0, 9), (0.01, 2), (1.0, 3)])
def test_dense_is_the_softmax_over_visible_keys(documents, window_blocks):
    """Against float64 NumPy that goes through queries and heads one by one."""
    rng = np.random.default_rng(0)
    tokens = np.stack([random_tokens(rng, LENGTH, documents) for _ in range(2)])
    q, k, v, d_out = inputs(1)
    out = value_and_gradients(q, k, v, d_out, tokens, window_blocks, "dense")[0]
    for row in range(2):
        expected = softmax_attention(q[row], k[row], v[row], visible_pairs(tokens[row], window_blocks), SCALE)
        np.testing.assert_allclose(out[row], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("documents", [0.0, 0.004, 0.05])
@pytest.mark.parametrize("window_blocks", [0, 1, 2, 3, 4, 50])
def test_banded_is_dense(documents, window_blocks):
    """Value and all three gradients agree to float32 rounding, for random documents and every window."""
    rng = np.random.default_rng(window_blocks)
    tokens = np.stack([random_tokens(rng, LENGTH, documents) for _ in range(2)])
    arguments = (*inputs(2), tokens, window_blocks)
    for banded, dense in zip(value_and_gradients(*arguments, "banded"), value_and_gradients(*arguments, "dense")):
        assert relative_error(banded, dense) < 2e-6


def test_one_compilation_serves_every_window():
    """The window is a number of the compiled program, not a part of its shape."""
    attention = jax.jit(lambda *arguments: value_and_gradients(*arguments, "banded")[0])
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    results = [attention(*inputs(3, batch=1), tokens, window) for window in (1, 2, 3, 4)]
    assert attention._cache_size() == 1
    for narrow, wide in itertools.pairwise(results):
        assert relative_error(narrow, wide) > 1e-3  # and it matters


@pytest.mark.parametrize("implementation", ["dense", "banded"])
def test_bfloat16_is_float32_up_to_rounding(implementation):
    """Inputs rounded to bfloat16, sums in float32: errors stay near bfloat16's 2^-8, gradients included."""
    tokens = random_tokens(np.random.default_rng(4), LENGTH, 0.01)[None]
    halves = inputs(4, batch=1, dtype=jnp.bfloat16)
    results = value_and_gradients(*halves, tokens, 3, implementation)
    exact = value_and_gradients(*(x.astype(jnp.float32) for x in halves), tokens, 3, "dense")
    for result, expected in zip(results, exact):
        assert result.dtype == jnp.bfloat16
        assert relative_error(result, expected) < 1e-2


@pytest.mark.parametrize("implementation", ["dense", "banded"])
@pytest.mark.parametrize("window_blocks", [1, 2, 4])
def test_gradients_reach_exactly_the_visible_keys(implementation, window_blocks):
    """Output t moves with k[j] and v[j] if t sees j; else, in the future, in another document or beyond the window,
    the derivative is zero exactly. q[j] moves output j alone."""
    tokens = np.zeros(LENGTH, np.int32)
    tokens[[100, 200, 300]] = END_OF_TEXT
    visible = visible_pairs(tokens, window_blocks)
    q, k, v, d_out = inputs(5, batch=1)
    for t in (99, 150, 200, 299, 420, 511):
        d_out_t = jnp.zeros_like(d_out).at[:, t].set(d_out[:, t])
        _, dq, dk, dv = value_and_gradients(q, k, v, d_out_t, tokens[None], window_blocks, implementation)
        for gradient, expected in ((dk, visible[t]), (dv, visible[t]), (dq, np.arange(LENGTH) == t)):
            if visible[t].sum() == 1 and gradient is not dv:
                continue  # a softmax of one score is 1: its derivative is rounding
            np.testing.assert_array_equal(np.asarray(gradient[0] != 0).any((1, 2)), expected)


def test_every_query_alone_in_its_document_returns_its_own_value():
    """Documents of one token: no neighbour leaks in, whatever the scores."""
    q, k, v, d_out = inputs(6, batch=1)
    tokens = np.full((1, LENGTH), END_OF_TEXT, np.int32)
    for implementation in ("dense", "banded"):
        out = value_and_gradients(q, 100 * k, v, d_out, tokens, 4, implementation)[0]
        np.testing.assert_array_equal(out, v)


def test_memory_of_banded_is_linear_in_length():
    """Temporaries of forward and backward pass, as the compiler plans them, double when the length doubles.

    A [T, T] array would quadruple them; the dense implementation shows that the measurement can tell.
    """

    def temporaries(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16)
        tokens, window = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        lowered = value_and_gradients.lower(x, x, x, x, tokens, window, implementation)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384, "banded") < 2.2 * temporaries(8192, "banded")
    assert temporaries(4096, "dense") > 3.5 * temporaries(2048, "dense")
    assert temporaries(16384, "banded") < 16384**2  # a byte a pair


@pytest.mark.parametrize("model", [tiny_model(), tiny_gpt2()])
def test_sequences_that_are_no_whole_blocks_are_named(model):
    """Also to who calls the model from Python, whom no command has checked before."""
    tokens = jnp.zeros((1, 100), jnp.int32)
    with pytest.raises(ValueError, match="sequences of 100 tokens are not whole blocks of 128"):
        jax.eval_shape(model.apply, {"params": abstract_params(model)}, tokens, tokens, 1)
