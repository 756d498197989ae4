"""Short convolutions of what sublayers read: loops in float64, what crosses no border, and what a model does with them.

Whole models are held against the formulas in test_variants.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import END_OF_TEXT
from test_stream_mlp import operands
from tiny import TINY, random_params, random_sequences, tiny_model

from senano_jax.attention import document_start
from senano_jax.config import LayerSchedule
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.pieces.short_convolution import Convolution, convolved
from senano_jax.model.schedule import Weighted
from senano_jax.model.stream_mlp import stream_mlp
from senano_jax.presets import preset
from senano_jax.profiling.flops import matrix_flops_per_token
from senano_jax.training.memory import activation_bytes
from senano_jax.training.mesh import make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState
from senano_jax.training.step import make_train_step

WIDTH = 5
# Where documents begin in two sequences: one has documents of 1, 2 and 3 tokens and a longer one, the other one alone.
STARTS = ((0, 1, 3, 6), ())


def places_of(length: int) -> np.ndarray:
    tokens = np.zeros((len(STARTS), length), np.int32)
    for row, borders in zip(tokens, STARTS, strict=True):
        row[[border for border in borders if border < length]] = END_OF_TEXT
    return np.arange(length) - np.asarray(document_start(jnp.asarray(tokens)))


def drawn(length: int):
    """Of h, the weights and a gradient."""
    rng = np.random.default_rng(length)
    return tuple(rng.standard_normal(shape) for shape in ((2, length, WIDTH), (3, WIDTH), (2, length, WIDTH)))


def by_loops(h, weights, pulled):
    """What comes out, and the gradients of h and the weights, from the definition alone."""
    out, d_h, d_weights = h.copy(), pulled.copy(), np.zeros_like(weights)
    for b, borders in enumerate(STARTS):
        for t in range(h.shape[1]):
            first = max(border for border in (0, *borders) if border <= t)  # of the document
            for k in (1, 2, 3):
                if t - k >= first:
                    out[b, t] += weights[k - 1] * h[b, t - k]
                    d_h[b, t - k] += weights[k - 1] * pulled[b, t]
                    d_weights[k - 1] += pulled[b, t] * h[b, t - k]
    return out, d_h, d_weights


@pytest.mark.parametrize("length", [1, 2, 3, 37])
def test_values_and_gradients_are_those_of_loops_in_float64(length):
    h, weights, pulled = drawn(length)
    places = jnp.asarray(places_of(length))
    inputs = (jnp.asarray(x, jnp.float32) for x in (h, weights))
    out, pull_back = jax.vjp(lambda h, weights: convolved(h, Convolution(weights, places)), *inputs)
    for found, expected in zip((out, *pull_back(jnp.float32(pulled))), by_loops(h, weights, pulled), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_is_rounded_once():
    """Values and the gradient of h are the nearest bfloat16 numbers to the exact ones, but for ties."""
    h, weights, pulled = drawn(37)
    h, pulled = (jnp.asarray(x, jnp.bfloat16) for x in (h, pulled))
    weights, places = jnp.asarray(weights, jnp.float32), jnp.asarray(places_of(37))
    out, pull_back = jax.vjp(lambda h, weights: convolved(h, Convolution(weights, places)), h, weights)
    d_h, d_weights = pull_back(pulled)
    assert out.dtype == d_h.dtype == jnp.bfloat16 and d_weights.dtype == jnp.float32
    exact = by_loops(*(np.asarray(x, np.float64) for x in (h, weights, pulled)))
    for found, expected in zip((out, d_h), exact):
        assert (np.abs(np.float64(found) - expected) <= 2**-8 * np.abs(expected) + 1e-6).all()
    np.testing.assert_allclose(d_weights, exact[2], rtol=1e-5, atol=1e-5)


def test_a_token_depends_on_itself_and_on_three_of_its_document_before_it():
    """The derivative by all others is zero exactly."""
    length = 12
    h, weights, _ = (jnp.asarray(x, jnp.float32) for x in drawn(length))
    convolution = Convolution(weights, jnp.asarray(places_of(length)))
    slopes = jax.jacrev(lambda h: convolved(h, convolution).sum(-1))(h)  # [2, T, 2, T, D]
    t, s = np.mgrid[:length, :length]
    for b, borders in enumerate(STARTS):
        document = np.cumsum(np.isin(np.arange(length), borders))
        reads = (t - 3 <= s) & (s <= t) & (document[t] == document[s])
        np.testing.assert_array_equal((slopes[b, :, b] != 0).all(-1), reads)
        np.testing.assert_array_equal((slopes[b, :, b] != 0).any(-1), reads)
        np.testing.assert_array_equal(slopes[b, :, 1 - b], 0)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
def test_the_kernel_of_the_second_half_of_a_layer_takes_one(implementation):
    """The MLP reads what the norm gives, convolved; here with all else by plain operations."""
    (x, x0, added, weights, up, down), gradient = operands(32)
    convolution = jnp.float32(np.random.default_rng(0).standard_normal((3, 32)))
    places = jnp.asarray(places_of(8))

    def expected(x, x0, added, weights, up, down, convolution):
        total = weights.x * x + weights.x0 * x0 + added
        normed = total * jax.lax.rsqrt(jnp.mean(total**2, -1, keepdims=True) + 1.1920929e-7)
        before = [jnp.pad(normed, ((0, 0), (k, 0), (0, 0)))[:, :8] * (places >= k)[..., None] for k in (1, 2, 3)]
        read = normed + sum(of_k * before_k for of_k, before_k in zip(convolution, before))
        return weights.sum * total + jnp.maximum(read @ up, 0) ** 2 @ down

    def found(*inputs):
        *others, convolution = inputs
        return stream_mlp(*others, implementation, convolution=Convolution(convolution, places))

    inputs = (x, x0, added, weights, up, down, convolution)
    (out, pull_back), (same, pull_same_back) = (jax.vjp(function, *inputs) for function in (found, expected))
    for ours, theirs in zip(
        jax.tree.leaves((out, pull_back(gradient))), jax.tree.leaves((same, pull_same_back(gradient)))
    ):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_it_changes_nothing(dtype):
    """All other weights and the loss are those of the model without, in every bit."""
    inputs = jnp.arange(128)[None]
    params, losses = {}, {}
    for where in ("none", "both"):
        small = dataclasses.replace(TINY, layers=LayerSchedule(1, 0, 0, 1), short_convolution=where)
        model = make_model(small, dtype)
        variables = jax.jit(model.init)(jax.random.key(3), inputs, inputs, 1)
        params[where] = dict(jax.tree.leaves_with_path(variables["params"]))
        moved = jax.tree.map_with_path(other_than_zero, variables["params"])
        losses[where] = model.apply({"params": moved}, inputs, inputs, 1)
    assert len(params["both"]) == len(params["none"]) + 2 * 2
    for path, weights in params["both"].items():
        np.testing.assert_array_equal(weights, params["none"].get(path, 0), jax.tree_util.keystr(path))
    assert losses["both"] == losses["none"]


def other_than_zero(path, parameter):
    """A fresh model's last matrices are zero, and would hide what its sublayers read."""
    return parameter + 0.1 if path[-1].key in ("out", "down", "head") else parameter


@pytest.mark.parametrize(
    ("where", "sublayers"),
    [("attention", {"attention"}), ("mlp", {"mlp"}), ("both", {"attention", "mlp"}), ("none", set())],
)
def test_every_layer_has_weights_by_visit_where_they_are_asked_for(where, sublayers):
    """A layer without attention none for it."""
    layers = LayerSchedule(1, 2, 4, 1, no_attention=(3,))
    params = abstract_params(tiny_model(layers=layers, short_convolution=where))
    found = {
        (path[-2].key, path[-1].key): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key.endswith("_convolution")
    }
    assert found == {
        (f"layer_{layer}", f"{sublayer}_convolution"): (4 if layer in (1, 2) else 1, 3, 32)
        for sublayer in sublayers
        for layer in range(3 if sublayer == "attention" else 4)
    }


@pytest.mark.parametrize("changes", [{"unroll": True}, {"trunk": Weighted(), "remat": "full"}])
def test_each_visit_moves_weights_of_its_own(changes):
    model = tiny_model(short_convolution="both", **changes)
    sequence = random_sequences(1, 128)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradients_of(params, visits=None):
        return model.apply({"params": params}, sequence[:, :-1], sequence[:, 1:], 1, visits=visits)

    gradients = gradients_of(random_params(model))["loop"]["layer_2"]
    for name in ("attention_convolution", "mlp_convolution"):
        first, second = gradients[name]
        assert (first != 0).all() and (second != 0).all() and (first != second).all()
    if isinstance(model.config.trunk, Weighted):
        first, second = gradients_of(random_params(model), 1)["loop"]["layer_2"]["mlp_convolution"]
        assert first.any() and not second.any()


def test_two_devices_make_the_step_of_one():
    """Of four sequences, dealt out."""
    model, optimizer = tiny_model(short_convolution="both", layers=LayerSchedule(1, 0, 0, 1)), optax.sgd(1e-3)
    sequences = random_sequences(4, 128)
    results = []
    for devices in (1, 2):
        mesh = make_mesh(devices)
        params = jax.tree.map(np.array, random_params(model))
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        state = jax.device_put(state, replicated(mesh))
        state, metrics = make_train_step(model, optimizer, mesh)(state, place_batch(mesh, sequences, 1), 1)
        results.append((state.params["layer_0"], metrics))
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
    moved = results[0][0]["attention_convolution"] - random_params(model)["layer_0"]["attention_convolution"]
    assert np.abs(moved).max() > 1e-4


def test_it_costs_no_product_and_one_array_a_sublayer():
    plain = dataclasses.replace(TINY, remat="none")
    both = dataclasses.replace(plain, short_convolution="both")
    assert matrix_flops_per_token(both) == matrix_flops_per_token(plain)
    more = activation_bytes(both, "bfloat16", 256) - activation_bytes(plain, "bfloat16", 256)
    assert more == 2 * TINY.positions * 256 * 32 * 2


def test_the_preset_stays_within_the_limit():
    config = preset("short-convolution")
    count = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    assert count == 158_960_046 + 30 * 2 * 3 * 768 <= 162_000_000
