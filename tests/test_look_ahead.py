"""Gradients ahead of the weights, against numbers of the original program; and the step asks for them there."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error
from tiny import random_sequences, tiny_model

from senano_jax.config import changed
from senano_jax.optim.config import Cooldown, LookAhead
from senano_jax.optim.look_ahead import LookAheadState, look_ahead, with_look_ahead
from senano_jax.optim.recipe import make_optimizer, scale_by_rate
from senano_jax.optim.schedules import learning_rate_factor
from senano_jax.presets import preset
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch
from senano_jax.training.state import init_state
from senano_jax.training.step import make_train_step

SCHEDULE = Cooldown(fraction=0.6, floor=0.4)


def drawn(seed, shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", ["quad", "quad2"])
def test_it_is_the_original_program(case):
    """Ten steps down a quadratic: the points of the gradients, their distance, weights and direction."""
    with np.load(Path(__file__).parent / "data/look_ahead.npz") as file:
        about, arrays = json.loads(str(file["meta"]))[case], {name: file[name] for name in file.files if name != "meta"}
    slopes = drawn(431, (12, 12))
    slopes = slopes @ slopes.T / 12 + np.float32(0.1) * np.eye(12, dtype=np.float32)
    settings = LookAhead(about["k0"], about["gamma"], about["prefill"] / 10, about["rest"] / 10)
    inner = scale_by_rate(lambda step: 0.3 * learning_rate_factor(step, 10, SCHEDULE))
    optimizer = with_look_ahead(inner, settings, SCHEDULE, 10)
    weights = jnp.asarray(drawn(432, (12,)))
    state = optimizer.init(weights)
    for step in range(10):
        ahead = look_ahead(state, weights)
        assert relative_error(ahead, arrays[f"{case}__theta_look"][step]) < 2e-6
        assert float(state.distance) == pytest.approx(arrays[f"{case}__k"][step], abs=1e-6)
        updates, state = jax.jit(optimizer.update)(slopes @ ahead, state, weights)
        weights = optax.apply_updates(weights, updates)
        assert relative_error(weights, arrays[f"{case}__w"][step]) < 2e-6
        assert relative_error(state.direction, arrays[f"{case}__l"][step]) < 2e-6


def test_training_takes_its_gradient_there():
    """The loss of a step is that of the weights ahead; without a look-ahead, of the weights themselves."""
    recipe = changed(
        preset("recurrent").optimizer, {"look_ahead": LookAhead(distance=2.0, decay=0.5, start=0.0, end=1.0)}
    )
    model, mesh, optimizer = tiny_model(), make_mesh(1), make_optimizer(recipe, 10, DATA_AXIS)
    step, state = make_train_step(model, optimizer, mesh), init_state(model, optimizer, 0, mesh)
    sequences = random_sequences(2, 256)
    for _ in range(2):
        before = jax.tree.map(np.asarray, state)
        state, metrics = step(state, place_batch(mesh, sequences, 1), 2)
    assert isinstance(before.opt_state, LookAheadState)
    loss = jax.jit(model.apply)
    losses = [
        float(loss({"params": params}, sequences[:, :-1], sequences[:, 1:], 2)) / 512
        for params in (look_ahead(before.opt_state, before.params), before.params)
    ]
    assert float(metrics.loss) == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    plain = make_optimizer(preset("recurrent").optimizer, 10)
    assert look_ahead(plain.init(before.params), before.params) is before.params


def test_the_state_keeps_its_types():
    """Or the second step of a run would be compiled anew."""
    weights = {"matrix": jnp.ones((4, 4))}
    optimizer = with_look_ahead(scale_by_rate(lambda step: 0.1), LookAhead(0.3, 0.9, 0.1, 0.9), SCHEDULE, 10)
    state = optimizer.init(weights)
    _, after = optimizer.update(weights, state, weights)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert jax.typeof(now) == jax.typeof(before) and now.weak_type == before.weak_type
