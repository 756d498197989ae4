"""What goes from visit to visit of the loop, against the original functions; and in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces_reference import largest_error, reference
from tiny import random_params, random_sequences, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.model.schedule import Weighted
from senano_jax.model.trunks import between
from senano_jax.model.trunks.between import begin, enter, finish, leave
from senano_jax.model.trunks.lanes import LaneWeights


def looped(kind, e, A1, A2, visits, weights=None):
    """The toy loop of the references: u <- u + tanh(u A1), u <- u + tanh(u A2) at each visit. Returns what the layers
    after the loop read and what each visit read."""
    carried, read = begin(kind, e, 2), []
    for k in range(visits):
        of_visit = None if weights is None else jax.tree.map(lambda w, k=k: w[k], weights)
        u = enter(kind, carried, of_visit)
        read.append(u)
        for A in (A1, A2):
            u = u + jnp.tanh(u @ A)
        carried = leave(kind, carried, u, of_visit, jnp.float32)
    return finish(kind, carried), jnp.stack(read)


def test_the_norm_and_what_entered_are_added_as_in_the_original():
    """Three visits: output and gradients of what entered and of the layers."""
    inputs, arrays = reference("d_boundary")
    given = [jnp.asarray(inputs[name]) for name in ("e", "A1", "A2")]
    value, pull_back = jax.vjp(lambda e, A1, A2: looped("norm", e[None], A1, A2, 3)[0][0], *given)
    assert largest_error(value, arrays["y_a1"]) < 3e-6
    for name, gradient in zip(("e", "A1", "A2"), pull_back(jnp.asarray(inputs["gy"])), strict=True):
        assert largest_error(gradient, arrays[f"d_{name}_a1"]) < 2e-5, name


def test_lanes_are_the_original_ones(monkeypatch):
    """Four visits with random weights. The original's norm has a gain, which stands in the place of ours here."""
    inputs, arrays = reference("d_hyperconnect_random")
    names = ("e", "A1", "A2", "gain", "alpha", "M", "beta")

    def loop(e, A1, A2, gain, alpha, M, beta):
        def with_gain(x):
            return x, gain * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

        monkeypatch.setattr(between, "norm_fork", with_gain)
        y, read = looped("lanes", e[None], A1, A2, 4, LaneWeights(alpha, M, beta))
        return y[0], read[:, 0]

    value, pull_back, read = jax.vjp(loop, *(jnp.asarray(inputs[name]) for name in names), has_aux=True)
    assert largest_error(read, arrays["u"]) < 3e-6
    assert largest_error(value, arrays["y"]) < 3e-6
    for name, gradient in zip(names, pull_back(jnp.asarray(inputs["gy"])), strict=True):
        assert largest_error(gradient, arrays[f"d_{name}"]) < 2e-5, name


@pytest.mark.parametrize("kind", ["norm", "lanes"])
def test_the_model_carries_it_from_visit_to_visit(kind):
    """Two of three visits, scanned and unrolled alike; every weight of the lanes has a gradient but those of the visit
    that is left out."""
    layers, trunk = LayerSchedule(1, 1, 3, 1), Weighted(between=kind, exits=kind == "lanes")
    model = tiny_model(layers=layers, trunk=trunk)
    params = random_params(model)
    tokens = jnp.asarray(random_sequences(1, 128))

    def loss(params, model):
        return model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], 1, visits=2)

    value, gradients = jax.value_and_grad(loss)(params, model)
    np.testing.assert_allclose(value, loss(params, tiny_model(layers=layers, trunk=trunk, unroll=True)), rtol=1e-5)
    stream = tiny_model(layers=layers, trunk=Weighted(exits=kind == "lanes"))
    without = {name: p for name, p in params.items() if not name.startswith("lane_")}
    assert abs(value - loss(without, stream)) > 1e-3
    for name in ("lane_read", "lane_kept", "lane_written") if kind == "lanes" else ():
        of_visits = np.abs(gradients[name]).reshape(3, -1).max(axis=1)
        assert np.all(of_visits[:2] > 0) and of_visits[2] == 0


def test_lanes_begin_as_described():
    """Visits read the lanes in turn, keep both and write to both."""
    model = tiny_model(layers=LayerSchedule(1, 1, 3, 1), trunk=Weighted(between="lanes"))
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = model.init(jax.random.key(0), tokens, tokens, 1)["params"]
    np.testing.assert_array_equal(params["lane_read"], [[1, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(params["lane_kept"], [np.eye(2)] * 3)
    np.testing.assert_array_equal(params["lane_written"], np.ones((3, 2)))
