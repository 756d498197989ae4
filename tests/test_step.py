"""The training step: one function of a set of sequences, however they are dealt out, compiled once."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from oracles import relative_error
from tiny import random_params, random_sequences

from senano_jax.config import LayerSchedule, changed
from senano_jax.optim.recipe import make_optimizer
from senano_jax.plan import window_blocks
from senano_jax.presets import preset
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch, place_sequences, replicated
from senano_jax.training.state import TrainState, init_state
from senano_jax.training.step import make_eval_step, make_train_step

LENGTH, WINDOW, RATE = 256, 2, 1e-3
tiny_model = functools.partial(tiny.tiny_model, layers=LayerSchedule(1, 0, 0, 1))  # the step knows nothing of layers
SPLITS = [(1, 16), (2, 4), (4, 1), (8, 2)]  # devices, micro-batches


def sgd():
    return optax.sgd(RATE)


def muon_and_adam():
    return make_optimizer(preset("recurrent").optimizer, 10, DATA_AXIS)


def fresh_state(model, optimizer, mesh):
    """With copies of the random weights, since the step consumes its state."""
    params = jax.tree.map(np.array, random_params(model))
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    return jax.device_put(state, replicated(mesh))


def one_step(make_optimizer, devices, micro_batches, dtype="float32"):
    """Parameters (NumPy), loss and gradient norm after a step on the same 16 sequences."""
    model, mesh, optimizer = tiny_model(dtype), make_mesh(devices), make_optimizer()
    batch = place_batch(mesh, random_sequences(16, LENGTH), micro_batches)
    assert batch.shape == (micro_batches, 16 // micro_batches, LENGTH + 1)
    state, metrics = make_train_step(model, optimizer, mesh)(fresh_state(model, optimizer, mesh), batch, WINDOW)
    assert state.step == 1
    return jax.tree.map(np.asarray, state.params), float(metrics.loss), float(metrics.grad_norm)


@functools.cache
def summed_gradients():
    """Sum over the 16 sequences of their losses and gradients, each computed by itself."""
    model, params = tiny_model(), random_params(tiny_model())
    loss = jax.jit(jax.value_and_grad(lambda p, s: model.apply({"params": p}, s[None, :-1], s[None, 1:], WINDOW)))
    results = [jax.tree.map(np.asarray, loss(params, sequence)) for sequence in random_sequences(16, LENGTH)]
    return jax.tree.map(lambda *arrays: np.sum(arrays, axis=0, dtype=np.float64), *results)


def assert_is_the_sum(params, loss, grad_norm):
    """A step of plain gradient descent shows the gradient itself: (before - after) / rate."""
    total, gradients = summed_gradients()
    before = random_params(tiny_model())
    assert loss == pytest.approx(total / (16 * LENGTH), rel=1e-6)
    leaves = jax.tree.leaves(gradients)
    assert grad_norm == pytest.approx(np.sqrt(sum(np.sum(g**2) for g in leaves)), rel=1e-5)
    for new, old, gradient in zip(jax.tree.leaves(params), jax.tree.leaves(before), leaves, strict=True):
        # float32 parameters: the difference carries half an ulp of the parameter, over the rate
        rounding = np.finfo(np.float32).eps * np.abs(old).max() / RATE
        np.testing.assert_allclose((old - new) / RATE, gradient, rtol=0, atol=2e-5 * np.abs(gradient).max() + rounding)


@pytest.mark.parametrize(("devices", "micro_batches"), SPLITS)
def test_any_split_gives_the_sum_over_the_sequences(devices, micro_batches):
    """16 sequences over devices and micro-batches: neither averaged, nor counted twice, nor left out. The oracle
    computes one sequence at a time and adds in float64."""
    assert_is_the_sum(*one_step(sgd, devices, micro_batches))


def test_sixteen_devices_give_the_same():
    """In a process of its own, which has 16."""
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 16); import test_step as t; "
        "t.assert_is_the_sum(*t.one_step(t.sgd, 16, 1)); print('same')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "same\n", result.stderr


def test_the_full_optimiser_does_not_see_the_split():
    """Loss and gradient norm to float32 rounding. Steps to 2%: Newton-Schulz in bfloat16 turns the last bits of a
    gradient into a percent of the step."""
    one, eight = one_step(muon_and_adam, 1, 2), one_step(muon_and_adam, 8, 2)
    assert one[1:] == pytest.approx(eight[1:], rel=1e-5)
    before = random_params(tiny_model())
    for old, a, b in zip(*(jax.tree.leaves(tree) for tree in (before, one[0], eight[0])), strict=True):
        if np.any(a != old):
            assert relative_error(a - old, b - old) < 0.02


SYSTEMS = {
    "llmc": tiny.tiny_gpt2(num_layers=1),
    "value-embeddings": tiny_model(value_embeddings=1, layers=LayerSchedule(1, 0, 0, 1)),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_other_systems_learn_and_do_not_see_the_split(name):
    """Their model with their optimiser: 4 sequences at once or in two micro-batches give the same loss, gradient norm
    and step; and a few steps on the same sequences lower the loss.

    Of AdamW's step the first moments are compared, the mean gradients after clipping: it moves a weight whose gradient
    is nothing but rounding, such as a bias of all keys, as far as any other.
    """
    model, mesh = SYSTEMS[name], make_mesh(1)
    config = preset(name).optimizer
    if name == "llmc":
        config = changed(config, {"schedule.warmup_steps": 1})
    optimizer = make_optimizer(config, 10, DATA_AXIS)
    before, sequences = random_params(model), random_sequences(4, LENGTH, vocabulary=500)
    states, losses = [], []
    for micro_batches in (1, 2):
        step, batch = make_train_step(model, optimizer, mesh), place_batch(mesh, sequences, micro_batches)
        state, metrics = step(fresh_state(model, optimizer, mesh), batch, WINDOW)
        states.append(jax.tree.map(np.asarray, state))
        losses.append([float(value) for value in metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if name == "llmc":
        moments = [optax.tree.get(state.opt_state, "mean") for state in states]
        assert optax.tree.norm(moments[0]) == pytest.approx(0.1, rel=1e-4)  # (1 - b1) x the norm clipped to
        for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
            assert relative_error(a, b) < 1e-5
    else:
        for old, a, b in zip(*map(jax.tree.leaves, (before, *(state.params for state in states))), strict=True):
            if np.any(a != old):
                assert relative_error(a - old, b - old) < 0.02
    for _ in range(4):
        state, metrics = step(state, batch, WINDOW)
    assert float(metrics.loss) < losses[0][0] - 0.01


def test_a_bfloat16_embedding_accumulates_in_float32():
    """Sixteen micro-batches or one: sums rounded to bfloat16 after each would drift apart by whole percents."""
    whole, split = one_step(sgd, 1, 1, "bfloat16")[0], one_step(sgd, 1, 16, "bfloat16")[0]
    before = np.asarray(random_params(tiny_model("bfloat16"))["embedding"], np.float32)
    assert whole["embedding"].dtype == jnp.bfloat16
    moves = [np.asarray(params["embedding"], np.float32) - before for params in (whole, split)]
    assert np.linalg.norm(moves[0]) > 0
    assert relative_error(*moves) < 0.1


def test_a_fresh_state_is_that_of_its_seed():
    """Made on eight devices it is the model's own initialisation, with moments of zero, at step 0."""
    model = tiny_model()
    state = init_state(model, muon_and_adam(), 3, make_mesh(8))
    tokens = jnp.zeros((1, 128), jnp.int32)
    expected = jax.jit(model.init)(jax.random.key(3), tokens, tokens, 1)["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    for leaf in (state.step, *jax.tree.leaves(state.opt_state)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.fixture(scope="module")
def trainer():
    """A compiled step on eight devices that has been called once."""
    model, mesh, optimizer = tiny_model(), make_mesh(8), muon_and_adam()
    step = make_train_step(model, optimizer, mesh)
    batch = place_batch(mesh, random_sequences(16, LENGTH), 2)
    state, _ = jax.block_until_ready(step(fresh_state(model, optimizer, mesh), batch, 1))
    return step, state, batch


def test_one_compilation_serves_the_whole_window_schedule(trainer):
    """No compilation of any kind happens in a second run through all windows, as the compiler's own events tell."""
    step, state, batch = trainer
    state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    compilations = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        windows = [window_blocks(k, 1700, 1728) for k in range(0, 1701, 100)]
        assert set(windows) == set(range(1, 15))
        for window in windows:
            state = jax.block_until_ready(step(state, batch, window)[0])  # collectives of two steps can starve a CPU
        assert compilations == []
        assert step._cache_size() == 1
        jax.jit(lambda x: x + len(windows))(jnp.float32(1))  # the listener does hear
        assert len(compilations) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_state_is_donated(trainer):
    """The old state's buffers are gone after the step: weights and moments exist once. The batch stays."""
    step, state, batch = trainer
    state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    new_state, _ = jax.block_until_ready(step(state, batch, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))
    assert not batch.is_deleted()


def test_state_is_the_same_on_all_devices(trainer):
    """Every device applies the same update, bit for bit: replicas never drift."""
    _, state, _ = trainer
    for leaf in jax.tree.leaves(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 8
        for shard in shards[1:]:
            np.testing.assert_array_equal(shard, shards[0])


def test_evaluation_counts_what_it_is_told_to():
    """The summed loss of the sequences whose weight is 1, against one sequence at a time."""
    model, mesh = tiny_model(), make_mesh(4)
    params, sequences = random_params(model), random_sequences(4, LENGTH)
    evaluate = make_eval_step(model, mesh)
    directly = jax.jit(lambda s: model.apply({"params": params}, s[None, :-1], s[None, 1:], WINDOW))
    alone = [
        float(evaluate(params, place_sequences(mesh, sequences), place_sequences(mesh, weights), WINDOW))
        for weights in np.eye(4, dtype=np.float32)
    ]
    for sequence, loss in zip(sequences, alone):
        assert loss == pytest.approx(float(directly(sequence)), rel=1e-6)
    for weights in ([1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]):
        placed = place_sequences(mesh, np.asarray(weights, np.float32))
        total = float(evaluate(params, place_sequences(mesh, sequences), placed, WINDOW))
        assert total == pytest.approx(np.dot(weights, alone), rel=1e-6)
    assert evaluate._cache_size() == 1
