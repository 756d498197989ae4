"""A model with attention over depth, however it is computed; against formulas: test_variants.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, random_sequences, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.model.depth_attention import attend_depth
from senano_jax.model.schedule import Weighted
from senano_jax.model.trunks import depth
from senano_jax.optim.groups import parameter_group

DEPTH = {"layers": LayerSchedule(1, 4, 3, 1), "trunk": Weighted(depth_block=2)}


def loss_and_gradients(params, **changes):
    model, sequences = tiny_model(**(DEPTH | changes)), random_sequences(2, 128)

    def loss(params):
        return model.apply({"params": params}, sequences[:, :-1], sequences[:, 1:], 1)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for path, gradient in jax.tree.leaves_with_path(expected[1]):
        other = functools.reduce(lambda tree, key: tree[key.key], path, found[1])
        np.testing.assert_allclose(
            other, gradient, rtol=0, atol=2e-5 * np.linalg.norm(gradient) + 1e-7, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("change", [{}, {"unroll": True}, {"remat": "full"}], ids=str)
def test_the_kernels_are_the_plain_functions_in_a_whole_model(change, monkeypatch):
    """Gradients that are written in place go through readers, complete blocks, visits and recomputed layers."""
    params = random_params(tiny_model(**DEPTH))
    expected = loss_and_gradients(params)
    fused = functools.partial(attend_depth, implementation="fused")
    monkeypatch.setattr(depth, "attend_depth", fused)
    assert_close(loss_and_gradients(params, **change), expected)


@pytest.mark.parametrize("coda", [0, 1])
def test_without_queries_it_is_the_weighted_trunk(coda):
    """Whose layers and weights it has."""
    layers = LayerSchedule(2, 2, 2, coda)
    params = random_params(tiny_model(**DEPTH | {"layers": layers}))
    queries = jnp.zeros_like(params["depth_queries"])
    found = loss_and_gradients(params | {"depth_queries": queries}, layers=layers)
    without = {name: value for name, value in params.items() if name != "depth_queries"}
    assert_close(found, loss_and_gradients(without, layers=layers, trunk=Weighted()))
    readers = np.abs(found[1]["depth_queries"]).max(axis=1)
    assert np.all(readers[1:] > 0)  # the first has a single source
    assert np.abs(loss_and_gradients(params, layers=layers)[0] - found[0]) > 1e-3


def test_fresh_queries_are_zero_and_have_a_rule_of_their_own():
    model, tokens = tiny_model(**DEPTH), jnp.zeros((1, 128), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]
    assert params["depth_queries"].shape == (14 + 1, model.config.dim)
    assert params["depth_queries"].dtype == jnp.float32 and not params["depth_queries"].any()
    assert parameter_group((jax.tree_util.DictKey("depth_queries"),)) == "queries"
