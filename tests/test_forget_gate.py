"""Heads that forget: the formula, sums within documents, what it depends on, precision in bfloat16, and the start."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_alone import check_by_formula, dependence, tokens_with_documents
from tiny import tiny_model

from senano_jax.config import LayerSchedule, ModelConfig
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params
from senano_jax.model.config import check_model
from senano_jax.model.pieces.forget_gate import sums_in_documents, with_addends

STARTS = (1, 40, 41, 100, 255)


@pytest.mark.parametrize("options", [{}, {"head_gate": True, "exclusive_attention": True, "key_offset": "all"}])
def test_attention_is_that_of_the_formula(options):
    """In the second visit of a layer of the loop; the oracle multiplies weights by products of shares."""
    config = tiny_model(forget_gate=True, layers=LayerSchedule(1, 2, 2, 1), **options).config
    check_by_formula(config, 1, tokens_with_documents(*STARTS), visit=1)


@pytest.mark.parametrize(("length", "starts"), [(600, (1, 40, 41, 100, 127, 128, 500, 599)), (700, ()), (512, (130,))])
def test_sums_start_anew_with_each_document(length, starts):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 1, length, 3))
    expected, slopes, start = np.zeros_like(x), np.zeros_like(x), np.zeros((1, length), np.int32)
    for first, stop in pairwise([0, *starts, length]):
        start[0, first:stop] = first
        for t in range(first + 1, stop):
            expected[0, t] = x[0, first + 1 : t + 1].sum(0)
            slopes[0, t] = weights[0, t:stop].sum(0)
    sums, pull_back = jax.vjp(lambda x: sums_in_documents(x, np.arange(length) - start), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(sums, expected, atol=2e-5)
    np.testing.assert_allclose(pull_back(jnp.asarray(weights, jnp.float32))[0], slopes, atol=2e-5)


def test_nothing_comes_from_later_tokens_or_other_documents():
    config = tiny_model(forget_gate=True).config
    reached = dependence(config, 1, tokens_with_documents(60, 100), (59, 60, 80, 120))
    for row, (first, last) in zip(reached, [(0, 59), (60, 60), (60, 80), (100, 120)]):
        assert set(np.flatnonzero(row)) == set(range(first, last + 1))


def test_keys_hold_large_addends_in_bfloat16():
    """As far as float32 sums of products tell: addends of thousands to a sixteenth."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8), jnp.bfloat16)
    addend = jnp.abs(jax.random.normal(jax.random.key(1), (1, 64, 2))) * 1000
    q_new, k_new = with_addends(q, k, addend)
    assert q_new.dtype == k_new.dtype == jnp.bfloat16
    q64, k64, q_old, k_old = (np.asarray(x, np.float64) for x in (q_new, k_new, q, k))
    added = (q64 * k64).sum(-1) - (q_old[..., :-2] * k_old[..., :-2]).sum(-1)
    np.testing.assert_allclose(added, addend, rtol=2**-16)
    gradient = jax.grad(lambda a: (with_addends(q, k, a)[1][..., -2] * 3).sum().astype(jnp.float32))(addend)
    np.testing.assert_array_equal(gradient, 3)


def test_parameters_are_by_visit_and_layers_with_paired_heads_have_none():
    params = abstract_params(tiny_model(forget_gate=True, paired_heads=(2,), layers=LayerSchedule(1, 2, 4, 1)))
    layers = [params["layer_0"], params["loop"]["layer_1"]]
    assert [layer["attention"]["forget_gate"]["gate"].shape for layer in layers] == [(1, 2, 12), (4, 2, 12)]
    assert [layer["attention"]["forget_gate"]["bias"].shape for layer in layers] == [(1, 2), (4, 2)]
    assert "forget_gate" not in params["loop"]["layer_2"]["attention"]


def test_a_stream_too_narrow_for_the_gate_is_refused():
    config = ModelConfig(dim=8, num_heads=2, layers=LayerSchedule(1, 0, 0, 1), forget_gate=True)
    with pytest.raises(UserError, match=r"--model\.forget-gate reads 12 channels, --model.dim is 8; widen it"):
        check_model(config)
