"""Cautious weight decay of Muon, against NumPy in float64 and numbers of the original program."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

from senano_jax.config import changed, settings
from senano_jax.optim.config import Cooldown
from senano_jax.optim.decay import add_cautious_decay
from senano_jax.optim.muon import orthogonalized, scale_by_muon
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.normuon import normalized
from senano_jax.optim.recipe import make_optimizer, scale_by_rate
from senano_jax.presets import preset

CONSTANT = Cooldown(fraction=0.0, floor=1.0)


def drawn(seed, shape, scale=1.0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)


def trained(optimizer, params, gradients):
    """The parameters after each step, compiled."""
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def test_it_is_the_formula():
    """Entry by entry in a loop: the square of the rate, its schedule and the rate given with the step; the factor of
    each matrix, here twice for `up` and not for `out`; nothing for a vector."""
    rng = np.random.default_rng(0)
    shapes = {"up": (4, 16), "out": (4, 4)}
    steps, weights = ({name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()} for _ in range(2))
    steps["out"][0, 0] = 0
    decay = add_cautious_decay(0.3, lambda step: 0.5 / (step + 1))
    state = decay.init(weights)
    for number in range(2):
        rate = 0.25 * 0.5 / (number + 1)
        result, state = jax.jit(decay.update)(steps, state, weights, rate=0.25)
        for name, factor in {"up": 2, "out": 1}.items():
            expected = steps[name].astype(np.float64)
            for at, x in np.ndenumerate(weights[name]):
                expected[at] += rate * factor * 0.3 * x if steps[name][at] * x >= 0 else 0
            np.testing.assert_allclose(result[name], expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["wide", "tall", "square", "mlp"])
def test_muon_with_decay_is_the_original_program(case):
    """Weights after five steps of NorMuon at a decay of 1.2, float32; without decay they would be 0.5% elsewhere."""
    with np.load(Path(__file__).parent / "data/normuon.npz") as file:
        arrays = dict(file)
    about = json.loads(str(arrays["meta"]))["cases"][case]

    def ours(stored):
        return {"up": stored[0].T, "down": stored[1]} if case == "mlp" else {"out": stored[0].T}

    rule = normalized(orthogonalized(ITERATIONS["polar-express"], jnp.float32), 0.9)
    optimizer = optax.chain(
        scale_by_muon(lambda step: 0.85 + step / 3000, rule, down_rate=4.0),
        add_cautious_decay(1.2, lambda step: 0.023, down_rate=4.0),
        scale_by_rate(lambda step: 0.023),
    )
    start = ours(drawn(about["weight_seed"], about["shape"], about["weight_scale"]))
    gradients = [ours(drawn(seed, about["shape"], about["grad_scale"])) for seed in about["grad_seeds"]]
    weights = trained(optimizer, jax.tree.map(jnp.asarray, start), gradients)[-1]
    with_decay, without = (ours(arrays[f"{case}__f32__wd{d}__s5__w"]) for d in (1, 0))
    for name, before in start.items():
        assert relative_error(weights[name] - before, with_decay[name] - before) < 2e-5
        assert relative_error(weights[name] - before, without[name] - before) > 1e-3


def test_the_preset_differs_from_normuon_in_its_decay_alone():
    """And the decay is in its optimiser: under gradients of zero, matrices shrink by 1.2 times the square of the rate,
    the second projection four times as much."""
    plain, new = preset("normuon"), preset("cautious-decay")
    assert {name for name, value in settings(new).items() if value != settings(plain)[name]} == {
        "optimizer.matrices.decay"
    }
    params = {"embedding": jnp.ones((4, 8)), "layer_0": {"mlp": {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}}}
    optimizer = make_optimizer(changed(new.optimizer, {"schedule": CONSTANT}), 5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for moved, factor in ((updates["layer_0"]["mlp"]["up"], 2), (updates["layer_0"]["mlp"]["down"], 4)):
        np.testing.assert_allclose(moved, -factor * 1.2 * 0.023**2, rtol=1e-6)
    np.testing.assert_array_equal(updates["embedding"], 0)
