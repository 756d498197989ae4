"""The ladder's systems as whole models: against float64 NumPy, and their presets."""

import dataclasses

import few_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_tokens import COLUMNS, TOKENS
from oracle_variants import loss as expected_loss
from oracle_variants import slope
from oracles import random_tokens
from tiny import random_params, random_sequences, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.model.schedule import Weighted
from senano_jax.model.soft_cap import SoftCap

LENGTH, WINDOW = 256, 2
few_tokens = pytest.fixture(few_tokens.few_tokens)
SHIFTED = SoftCap(height=23, divisor=7.5, shift=5, by_width=False)
VARIANTS = {
    "head gate": {"head_gate": True, "layers": LayerSchedule(1, 2, 2, 1)},
    "weighted": {"trunk": Weighted(), "layers": LayerSchedule(1, 2, 3, 1), "unroll": True},
    "depth attention": {"trunk": Weighted(depth_block=2), "layers": LayerSchedule(2, 2, 3, 2), "tied": True},
    "all of it": {
        "trunk": Weighted(depth_block=1),
        "layers": LayerSchedule(1, 2, 2, 1),
        "head_gate": True,
        "cap": SHIFTED,
        "mlp_widths": ((3, 48),),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("few_tokens")
def test_loss_and_gradients_are_those_of_the_formulas(variant):
    """In every tensor, over several documents, with three tokens ahead: gates, weights of applications and shares of
    first values by visit."""
    model = tiny_model(vocab_size=TOKENS, padded_vocab_size=COLUMNS, **VARIANTS[variant])
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, LENGTH, 0.01, TOKENS - 1), rng.integers(0, TOKENS, LENGTH)
    assert np.count_nonzero(inputs == TOKENS - 1) > 1
    weights = np.float32([1, 0.5, 0.25])
    params = random_params(model)

    @jax.jit
    def run(params):
        return model.apply({"params": params}, inputs[None], targets[None], WINDOW, loss_weights=jnp.asarray(weights))

    value, gradients = jax.value_and_grad(run)(params)
    c = model.config
    cap = c.cap.at_width(c.dim)

    def by_formula(params):
        return expected_loss(
            params,
            inputs,
            targets,
            WINDOW,
            weights,
            layers=dataclasses.astuple(c.layers)[:4],
            heads=2,
            cap=(cap.height, cap.divisor, cap.shift),
            depth_block=getattr(c.trunk, "depth_block", None),
        )

    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    assert float(value) == pytest.approx(by_formula(params64), rel=1e-6)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        gradient = np.asarray(gradient, np.float64)
        direction = rng.standard_normal(gradient.shape)
        expected = slope(by_formula, params64, [key.key for key in path], direction)
        error = abs((gradient * direction).sum() - expected)
        assert error <= 2e-4 * np.linalg.norm(gradient), jax.tree_util.keystr(path)


def test_fewer_visits_are_those_of_a_model_that_has_no_more():
    """The first visits' weights serve, and the coda keeps its own."""
    trunk = Weighted(depth_block=2)
    four, two = (tiny_model(trunk=trunk, head_gate=True, layers=LayerSchedule(1, 2, n, 1)) for n in (4, 2))
    params, sequences = random_params(four), random_sequences(1, 128)
    fewer = dict(params)
    for name in ("stream_weights", "added_weights", "x0_weights"):
        fewer[name] = jnp.concatenate([params[name][:5], params[name][-1:]])
    fewer["depth_queries"] = jnp.concatenate([params["depth_queries"][:5], params["depth_queries"][-2:]])
    fewer["loop"] = jax.tree.map_with_path(first_two_visits, params["loop"])
    arguments = sequences[:, :-1], sequences[:, 1:], 1
    first, whole = jax.jit(four.apply, static_argnames="visits"), jax.jit(two.apply)
    loss = first({"params": params}, *arguments, visits=2)
    assert float(loss) == pytest.approx(float(whole({"params": fewer}, *arguments)), rel=1e-6)
    with pytest.raises(ValueError, match="weights for 1 to 4 visits, not for 5"):
        four.apply({"params": params}, *arguments, visits=5)


def first_two_visits(path, parameter):
    return parameter[:2] if path[-1].key in ("gate", "value_residual") else parameter


def test_skip_connections_need_all_visits():
    model, sequences = tiny_model(), random_sequences(1, 128)
    arguments = {"params": random_params(model)}, sequences[:, :-1], sequences[:, 1:], 1
    loss = jax.jit(model.apply, static_argnames="visits")
    assert loss(*arguments, visits=2) == loss(*arguments)
    with pytest.raises(ValueError, match="pair 2 visits of the loop, not 4"):
        model.apply(*arguments, visits=4)


def test_a_fresh_weighted_model_has_the_specified_weights():
    """The stream's grow it by 2.85 over all; sublayers of three visits begin with 3^(-1/2), the others with 1."""
    model = tiny_model(trunk=Weighted(), layers=LayerSchedule(1, 2, 3, 1))
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]
    assert params["stream_weights"].shape == params["added_weights"].shape == (8, 2)
    assert float(jnp.prod(params["stream_weights"])) == pytest.approx(2.85, rel=1e-5)
    np.testing.assert_allclose(params["added_weights"][:, 0], [1, *[3**-0.5] * 6, 1], rtol=1e-6)
    np.testing.assert_array_equal(params["added_weights"][:, 0], params["added_weights"][:, 1])
    np.testing.assert_array_equal(params["x0_weights"], np.zeros(8))
    np.testing.assert_array_equal(params["loop"]["layer_1"]["attention"]["value_residual"], [0.5] * 3)
