"""Devices that each keep the averages of their own matrices train as those do that all keep everything."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import random_params, random_sequences

from senano_jax import train
from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.optim.config import TailAverage
from senano_jax.optim.muon import orthogonalized
from senano_jax.optim.recipe import make_optimizer
from senano_jax.optim.shares import SharedMuonState, Shares
from senano_jax.presets import preset
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState, init_state, state_shardings
from senano_jax.training.step import make_train_step
from senano_jax.training.wiring import wire

STEPS, LENGTH, WINDOW = 10, 128, 2
tiny_model = functools.partial(tiny.tiny_model, layers=LayerSchedule(1, 1, 2, 1))
RECIPES = {
    "muon": (preset("recurrent").optimizer, {}),
    "normuon": (preset("cautious-decay").optimizer, {"matrices.query_key_columns": 16}),
    "everything": (
        preset("rare-adam").optimizer,
        {
            "matrices.query_key_columns": 16,
            "average": TailAverage(start=0.5, horizon=0.5, share=0.5, groups=("matrices", "head")),
        },
    ),
}


def optimizer_of(name, shares=None):
    recipe = changed(*RECIPES[name])
    # The first gradients of some scalars are rounding noise, which Adam turns into whole steps.
    recipe = changed(recipe, {"scalars.rate": 0.0})
    in_float32 = functools.partial(orthogonalized, dtype=jnp.float32)
    with pytest.MonkeyPatch.context() as patch:  # in bfloat16 another order of sums shows in all digits
        patch.setattr("senano_jax.optim.recipe.orthogonalized", in_float32)
        return make_optimizer(recipe, STEPS, DATA_AXIS, shares)


def shares_of(name, devices):
    return Shares(DATA_AXIS, devices, changed(*RECIPES[name]).matrices.query_key_columns)


def first_state(name):
    params = jax.tree.map(np.array, random_params(tiny_model()))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer_of(name).init)(params))


def shared_form(state, shares, mesh):
    state = state._replace(opt_state=shares.to_shared(state.opt_state))
    return jax.device_put(state, state_shardings(state, mesh))


@functools.cache
def trained(name, devices, shares=None, dtype=jnp.float32):
    """State after ten steps on batches of eight sequences; losses and gradient norms."""
    mesh, state = make_mesh(devices), first_state(name)
    state = jax.device_put(state, replicated(mesh)) if shares is None else shared_form(state, shares, mesh)
    step = make_train_step(tiny_model(), optimizer_of(name, shares), mesh, shares=shares, reduce_dtype=dtype)
    metrics = []
    for number in range(STEPS):
        state, values = step(state, place_batch(mesh, random_sequences(8, LENGTH, number), 1), WINDOW)
        metrics.append([float(value) for value in values])
    return state, np.asarray(metrics)


@functools.cache
def by_one_device(name):
    state, metrics = trained(name, 1)
    return jax.tree.map(np.asarray, state), metrics


@pytest.mark.parametrize(("name", "devices"), [("muon", 4), ("normuon", 2), ("everything", 4)])
def test_the_same_training_as_on_one_device(name, devices):
    """Losses, gradient norms, weights and all that the optimiser keeps. The model's stacks have 12 and 6
    matrices, or 12, 6 and 6, so that 4 devices have zeros behind some of them."""
    expected, expected_metrics = by_one_device(name)
    shares = shares_of(name, devices)
    state, metrics = trained(name, devices, shares)
    np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-4)
    opt_state = shares.to_replicated(state.opt_state, expected.opt_state)
    assert jax.tree.structure(opt_state) == jax.tree.structure(expected.opt_state)
    for new, old in zip(jax.tree.leaves((state.params, opt_state)), jax.tree.leaves(expected[1:]), strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype
        difference = np.linalg.norm(np.asarray(new, np.float32) - np.asarray(old, np.float32))
        assert difference <= 2e-3 * np.linalg.norm(np.asarray(old, np.float32))


def test_a_device_holds_its_own_averages_alone():
    mesh, shares = make_mesh(8), shares_of("normuon", 8)
    opt_state = shared_form(first_state("normuon"), shares, mesh).opt_state
    states = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SharedMuonState))
        if isinstance(node, SharedMuonState)
    ]
    (state,) = states
    arrays = jax.tree.leaves((state.momentum, state.stacks))
    assert len(arrays) >= 4
    for array in arrays:
        assert [shard.data.shape[0] * 8 for shard in array.addressable_shards] == [array.shape[0]] * 8


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_state_can_be_spread_and_made_whole_again(name):
    """To the last bit, whatever the numbers of matrices."""
    state = by_one_device(name)[0].opt_state
    shares = shares_of(name, 8)
    again = shares.to_replicated(shares.to_shared(state), state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_matrices_are_scattered_not_reduced_everywhere():
    """In the compiled program no all-reduce has a stack's size, and reduce-scatters hold all matrices."""
    shares, mesh = shares_of("muon", 8), make_mesh(8)
    state = shared_form(first_state("muon"), shares, mesh)
    step = make_train_step(tiny_model(), optimizer_of("muon", shares), mesh, shares=shares)
    batch = place_batch(mesh, random_sequences(8, LENGTH), 1)
    text = step.lower(state, batch, WINDOW).as_text()
    scattered = re.findall(r'"stablehlo\.reduce_scatter".*?\) : \(tensor<(\d+)x32x(\d+)xf32>\)', text, re.DOTALL)
    stacks = shares.stacks({"layers": _matrices(first_state("muon").params)})
    assert sorted((int(n), int(cols)) for n, cols in scattered) == sorted(
        (len(stack), stack.shape[-1]) for stack in stacks.values()
    )
    assert len(re.findall(r"stablehlo\.all_gather", text)) == len(stacks)


def _matrices(params):
    return {
        str(number): leaf
        for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(params))
        if path[-1].key in ("qkv", "out", "up", "down")
    }


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_that_travel_as_bfloat16(shared):
    """The sum is that of the rounded gradients: near enough for the same losses, and not the same bits."""
    shares = shares_of("muon", 4) if shared else None
    _, exact = by_one_device("muon")
    _, rounded = trained("muon", 4, shares, jnp.bfloat16)
    np.testing.assert_allclose(rounded, exact, rtol=0.02)
    assert np.any(rounded[:, 1] != trained("muon", 4, shares)[1][:, 1])


FLAGS = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0", "--steps=4",
    "--batch-tokens=512", "--seq-len=128", "--final-window-tokens=128", "--data.val-tokens=512",
    "--data.val-seq-len=128", "--val-every=0", "--checkpoint-every=2", "--checkpoint-keep=5", "--dtype=float32",
    "--optimizer.scalars.rate=0",
]  # fmt: skip


def losses_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], lines[-1]["val_loss"]


def test_a_run_goes_on_in_either_form_and_on_any_number_of_devices(tmp_path):
    """Stopped and resumed as it was, it has the bits of the undisturbed run; otherwise, nearly the same losses."""
    run, flag = tmp_path / "run", f"--run-dir={tmp_path / 'run'}"
    train.main([*FLAGS, flag, "--devices=4", "--share-matrices"])
    losses, val_loss = losses_of(run)
    for change, same_bits in (
        (("--devices=4", "--share-matrices"), True),
        (("--devices=2", "--no-share-matrices"), False),
    ):
        train.main([*FLAGS, flag, "--resume=2", *change])
        if same_bits:
            assert losses_of(run) == (losses, val_loss)
        else:
            assert losses_of(run)[0] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize(("name", "changes"), [("llmc", {}), ("demo", {"optimizer.head": None})])
def test_recipes_that_cannot_share_are_refused(name, changes):
    """GPT-2's has no Muon; without a rule of its own the head follows the matrices."""
    with pytest.raises(UserError, match="--share-matrices is for recipes that give the matrices to Muon"):
        wire(changed(preset(name), changes | {"share_matrices": True}))


def test_a_state_is_made_whole_without_a_word_of_xla(capfd):
    """It warns of stacks that it has to gather in order to cut queries and keys anew."""
    changes = {"share_matrices": True, "devices": 4, "model.dim": 32, "model.num_heads": 2, "steps": 4}
    matrices = preset("tied-recurrent").optimizer.matrices
    changes |= {"optimizer.matrices": matrices, "optimizer.matrices.query_key_columns": 16}
    wiring = wire(changed(preset("demo"), changes))
    wiring.to_replicated(wiring.to_shared(init_state(wiring.model, wiring.optimizer, 0, wiring.mesh)))
    assert capfd.readouterr().err == ""
