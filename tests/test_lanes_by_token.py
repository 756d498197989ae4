"""Weights of the lanes that go from layer to layer, as each token computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, random_sequences, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.errors import UserError
from senano_jax.model.schedule import Weighted
from senano_jax.model.trunks.lanes import LaneWeights, LayerLanes, read_lanes, write_lanes
from senano_jax.optim.groups import parameter_group

LAYERS = LayerSchedule(1, 1, 3, 1)
STATIC, BY_TOKEN = (Weighted(between="layer-lanes", lanes=3, lanes_by_token=by_token) for by_token in (False, True))


def through_a_layer(x_nTD, added_TD, read_n, kept_nn, written_n, generator_DM, scale_3):
    """Token by token: what a layer reads, and the lanes behind it, which adds `added`."""
    lanes, tokens, width = x_nTD.shape
    u_TD, new_nTD = np.zeros((tokens, width)), np.zeros_like(x_nTD)
    for t in range(tokens):
        root_n = np.sqrt(np.mean(x_nTD[:, t] ** 2, axis=1, keepdims=True) + 1.1920929e-7)
        o_nM = np.tanh(x_nTD[:, t] / root_n @ generator_DM)
        for j in range(lanes):
            u_TD[t] += (read_n[j] + scale_3[0] * o_nM[j, 0]) * x_nTD[j, t]
        for i in range(lanes):
            new_nTD[i, t] = (written_n[i] + scale_3[1] * o_nM[i, 1]) * added_TD[t]
            for j in range(lanes):
                new_nTD[i, t] += (kept_nn[i, j] + scale_3[2] * o_nM[j, 2 + i]) * x_nTD[j, t]
    return u_TD, new_nTD


def test_reading_keeping_and_writing_are_those_of_float64():
    """Random lanes and weights; values, and the gradient along a random direction by a difference in float64."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5, 8), (5, 8), (3,), (3, 3), (3,), (8, 5), (3,)]
    given, direction = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    gy_TD, g_nTD = rng.normal(size=(5, 8)), rng.normal(size=(3, 5, 8))

    def ours(x_nTD, added_TD, read, kept, written, generator, scale):
        lanes = tuple(x_nTD[:, None])
        weights = LayerLanes(LaneWeights(read, kept, written), generator, scale).of(lanes, jnp.float32)
        left = write_lanes(lanes, added_TD[None], weights)
        return read_lanes(lanes, weights, jnp.float32)[0], jnp.stack(left)[:, 0]

    value, pull_back = jax.vjp(ours, *(jnp.asarray(array, jnp.float32) for array in given))
    for result, expected in zip(value, through_a_layer(*given), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)

    def along(step):
        u_TD, new_nTD = through_a_layer(*(a + step * d for a, d in zip(given, direction, strict=True)))
        return np.sum(u_TD * gy_TD) + np.sum(new_nTD * g_nTD)

    gradients = pull_back((jnp.asarray(gy_TD, jnp.float32), jnp.asarray(g_nTD, jnp.float32)))
    ours_along = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradients, direction, strict=True))
    assert ours_along == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-4)


def test_at_the_start_all_tokens_have_the_same_weights_and_every_generator_learns():
    """The generators are zero, so that the loss is that without them, but for the order of sums; their gradients are
    not, in any application."""
    tokens = jnp.asarray(random_sequences(1, 128))

    def loss(params, model):
        return model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], 1)

    params = random_params(tiny_model(layers=LAYERS, trunk=BY_TOKEN))
    assert params["lane_generator"].shape == (5, params["head"].shape[0], 3 + 2)
    params |= {"lane_generator": jnp.zeros_like(params["lane_generator"])}
    value, gradients = jax.value_and_grad(loss)(params, tiny_model(layers=LAYERS, trunk=BY_TOKEN))
    without = {name: p for name, p in params.items() if name not in ("lane_generator", "lane_scale")}
    np.testing.assert_allclose(value, loss(without, tiny_model(layers=LAYERS, trunk=STATIC)), rtol=1e-5)
    assert np.all(np.abs(gradients["lane_generator"]).max(axis=(1, 2)) > 0)
    assert not gradients["lane_scale"].any()


def test_the_initial_generator_is_zero_and_its_scale_a_hundredth():
    model = tiny_model(layers=LAYERS, trunk=BY_TOKEN)
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]
    assert not params["lane_generator"].any()
    np.testing.assert_array_equal(params["lane_scale"], np.full((5, 3), 0.01, np.float32))


@pytest.mark.parametrize(("name", "group"), [("lane_generator", "generators"), ("lane_scale", "scalars")])
def test_the_rules_that_update_them(name, group):
    assert parameter_group((jax.tree_util.DictKey(name),)) == group


@pytest.mark.parametrize("between", ["stream", "norm", "lanes"])
def test_without_lanes_from_layer_to_layer_it_is_refused(between):
    with pytest.raises(
        UserError, match=rf"--model\.trunk\.lanes-by-token needs .* is {between}; leave one of them out"
    ):
        Weighted(between=between, lanes_by_token=True).check(LAYERS)
