"""Momentum of two averages, against float64 and against numbers of the original program."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

from senano_jax.config import changed, settings
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.config import Mixture
from senano_jax.optim.momentum import mixed, nesterov
from senano_jax.optim.muon import orthogonalized, scale_by_muon
from senano_jax.optim.newton_schulz import Iteration
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset

MIXTURE = Mixture(start=0.5, fast=0.7, slow=0.9, share=0.25)
TWELVE_STEPS = Iteration(((2.0, -1.5, 0.5),) * 12)


def directions(momentum, gradients):
    """Yields direction and averages of each step, compiled."""
    kept, update = momentum.init(gradients[0]), jax.jit(momentum.update)
    for step, gradient in enumerate(gradients):
        direction, kept = update(gradient, kept, step)
        yield direction, kept


def test_it_is_the_formula():
    """One average up to and including step 2 of 4, then two from there, each at its rate; beside it the plain one."""
    rng = np.random.default_rng(0)
    gradients = [{"x": rng.standard_normal((3, 5)).astype(np.float32)} for _ in range(5)]

    def mu(step):
        return 0.5 + 0.1 * step

    fast = slow = plain = np.zeros((3, 5))
    both = zip(directions(mixed(mu, MIXTURE, 4), gradients), directions(nesterov(mu), gradients))
    for step, ((mixture, (f, s)), (single, m)) in enumerate(both):
        g, b = gradients[step]["x"].astype(np.float64), 0.5 + 0.1 * step
        plain = plain + (1 - b) * (g - plain)
        fast, slow = (plain, plain) if step <= 2 else (fast + 0.3 * (g - fast), slow + 0.1 * (g - slow))
        assert relative_error(m["x"], plain) < 1e-6
        assert relative_error(single["x"], (1 - b) * g + b * plain) < 1e-6
        assert relative_error(f["x"], fast) < 1e-6
        assert relative_error(s["x"], slow) < 1e-6
        assert relative_error(mixture["x"], (1 - b) * g + b * (0.25 * fast + 0.75 * slow)) < 1e-6
    assert relative_error(mixture["x"], single["x"]) > 0.01


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_it_is_the_original_program(case):
    """Eight steps of its Muon, whose averages part after step 3 (counted from 0): averages and weights, float32."""
    with np.load(Path(__file__).parent / "data/mixed_momentum.npz") as file:
        about, arrays = json.loads(str(file["meta"]))["t3"], {name: file[name] for name in file.files if name != "meta"}

    def drawn(seed, scale=1.0):
        shape = about["cases"][case]["shape"]
        return np.random.RandomState(seed).standard_normal(shape).astype(np.float32).T * np.float32(scale)

    mixture = Mixture(start=3 / 8, fast=about["fast"], slow=about["slow"], share=about["weight_fast"])
    momentum = mixed(lambda step: jnp.float32(about["mu"]), mixture, 8)
    optimizer = scale_by_muon(momentum, orthogonalized(TWELVE_STEPS, jnp.float32))
    start = weights = drawn(*about["cases"][case]["weight"])
    state = optimizer.init({"out": weights})
    seeds = {"wide": 41100, "tall": 41200}
    compared = 0
    for step in range(8):
        updates, state = jax.jit(optimizer.update)({"out": drawn(seeds[case] + step)}, state)
        weights = (1 - 0.025 * 0.05) * weights - 0.025 * np.asarray(updates["out"])
        fast, slow = (average["out"] for average in state.momentum)
        for name, ours, scale in (("w", weights - start, start), ("m", fast, 0), ("mf", fast, 0), ("ms", slow, 0)):
            key = f"{case}__f32__s{step + 1}__{name}"
            if key in arrays and not (name == "m" and step > 3):  # which stands still, in a buffer of its own
                assert relative_error(ours, arrays[key].T - scale) < (5e-6 if name == "w" else 2e-6), key
                compared += 1
    assert compared >= {"wide": 1, "tall": 9}[case]


def test_the_preset_differs_in_its_mixture_alone():
    """And it is refused where it cannot work."""
    plain, new = settings(preset("rare-adam")), settings(preset("mixed-momentum"))
    assert {name for name in new if new[name] != plain.get(name)} == {
        "optimizer.matrices.mixture",
        *(f"optimizer.matrices.mixture.{n}" for n in ("start", "fast", "slow", "share")),
    }
    with pytest.raises(UserError, match=r"--optimizer.matrices.mixture.slow is 1.98; use a number from 0 to 1"):
        check_config(changed(preset("mixed-momentum"), {"optimizer.matrices.mixture.slow": 1.98}))


def test_a_recipe_with_a_mixture_moves_as_one_without_until_they_part():
    """Up to rounding, then otherwise."""
    recipe = preset("rare-adam").optimizer
    rng = np.random.default_rng(1)
    gradients = [{"layer_0": {"mlp": {"up": jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)}}} for _ in range(5)]
    moves = []
    for one in (recipe, changed(recipe, {"matrices.mixture": MIXTURE})):
        optimizer = make_optimizer(one, 4)
        state, update = optimizer.init(gradients[0]), jax.jit(optimizer.update)
        moves.append([])
        for gradient in gradients:
            updates, state = update(gradient, state, gradients[0])
            moves[-1].append(np.asarray(updates["layer_0"]["mlp"]["up"]))
    for step, (plain, mixture) in enumerate(zip(*moves)):
        assert (relative_error(mixture, plain) < 0.02) == (step <= 2)


@pytest.mark.parametrize("make", [nesterov, lambda mu: mixed(mu, MIXTURE, steps=4)])
def test_averages_keep_their_type(make):
    """They are float32, also of gradients that are not; a checkpoint of another type could not be read again."""
    gradients = {"up": jnp.ones((2, 3), jnp.bfloat16)}
    momentum = make(lambda step: jnp.float32(0.9))
    averages = momentum.init(gradients)
    _, new = momentum.update(gradients, averages, jnp.int32(0))
    assert {x.dtype for x in jax.tree.leaves((averages, new))} == {jnp.dtype(jnp.float32)}
