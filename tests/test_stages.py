"""A run in stages from end to end: what it records, how it goes on, and what its compiled step is given."""

import json
import shutil

import jax
import jax.numpy as jnp
import kept_programs
import numpy as np
import pytest
from faults.comparison import records, state_of
from resumed_runs import assert_same_bits, steps_of
from tiny import random_params, random_sequences, tiny_model

from senano_jax import evaluate, train
from senano_jax.config import LayerSchedule, Stage, changed
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, make_model
from senano_jax.optim.config import TailAverage
from senano_jax.optim.recipe import scale_by_rate
from senano_jax.plan import Plan
from senano_jax.presets import PRESETS, demo
from senano_jax.profile import main as profile
from senano_jax.runlog.reader import read_log
from senano_jax.runlog.track_rules import check_rules
from senano_jax.training.checkpoint import Checkpoints, load_params
from senano_jax.training.mesh import make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState
from senano_jax.training.step import make_train_step

one_trace = kept_programs.one_trace  # for all tests here

STEPS, BORDER = 6, 3
STAGES = (Stage(part=1, batch_tokens=512, seq_len=128, rate=0.5), Stage(part=1, batch_tokens=512))
TOKENS = [512, 1024, 1536, 2816, 4096, 5376]  # trained on after each step, in batches of 512 and of 1,280


def staged():
    """Two stages of one layer each way: another number of sequences, another length, another rate; and an average."""
    return changed(
        demo(),
        {
            "model.dim": 16,
            "model.layers": LayerSchedule(prelude=1, loop=0, visits=0, coda=1),
            "data.val_tokens": 512,
            "data.val_seq_len": 512,
            "optimizer.average": TailAverage(start=0.5, horizon=0.5, share=0.5, groups=("matrices", "head")),
            "stages": STAGES,
            "steps": STEPS,
            "seq_len": 256,
            "final_window_tokens": 256,
            "evaluation_window_tokens": 512,
            "val_every": 3,
            "devices": 1,
            "checkpoint_every": 1,
            "checkpoint_keep": 9,
            "compilation_cache": None,
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing happened to; the last stage's batch comes by a flag."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "staged", staged)
        path = tmp_path_factory.mktemp("runs") / "run"
        return train.main(["staged", "--stages.1.batch-tokens=1280", f"--run-dir={path}"])


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_every_step_is_recorded_with_the_tokens_of_its_stage(finished):
    """In metrics.jsonl, in the log line of evaluations, for `compare` and for `rules`; the rate is the stage's."""
    steps = [r for r in records(finished) if "loss" in r]
    assert [r["tokens_trained"] for r in steps] == [r["tokens_read"] for r in steps] == TOKENS
    lr = np.array([r["lr"] for r in steps])
    assert lr[:BORDER] == pytest.approx([0.5] * BORDER) and lr[BORDER] == 1  # the cooldown comes later
    evaluations = [r for r in records(finished) if "val_loss" in r]
    assert [(r["step"], r["tokens_trained"], r["window"]) for r in evaluations] == [
        (0, 0, 1),
        (3, 1536, 2),
        (6, 5376, 4),
    ]
    assert f"step:6/{STEPS} val_loss:" in (finished / "log.txt").read_text()
    assert "tokens:0.01M" in (finished / "log.txt").read_text()
    log = read_log(finished)
    assert log.tokens_trained == log.planned_tokens == TOKENS[-1]
    order = next(verdict for verdict in check_rules(finished) if verdict.rule == "every token once, in order")
    assert (order.status, order.value) == ("pass", TOKENS[-1])
    config, _ = read_config(finished / "config.json")
    assert [s.batch_tokens for s in config.stages] == [512, 1280]


@pytest.mark.parametrize("step", [BORDER - 1, BORDER, BORDER + 1])
def test_a_run_goes_on_across_the_border_as_if_it_had_not_stopped(step, copy, finished):
    """From a checkpoint before, at and behind it: the same records and the same state, bit for bit."""
    train.main(["--run-dir", str(copy), f"--resume={step}"])
    assert records(copy) == records(finished)
    assert_same_bits(state_of(copy), state_of(finished))
    assert steps_of(copy) == steps_of(finished)


def test_other_stages_are_another_run(copy):
    with pytest.raises(UserError, match=r"another configuration \(stages\.0\.rate 0\.5 -> 2\.0\); drop"):
        train.main(["--run-dir", str(copy), "--resume", "--stages.0.rate=2"])


def test_what_was_evaluated_is_what_others_load(finished):
    """The weights that the optimiser reads out, not the parameters, which a resumed run goes on with."""
    logged = {r["step"]: r["val_loss"] for r in records(finished) if "val_loss" in r}
    assert evaluate.main([str(finished)]) == pytest.approx(logged[STEPS], rel=1e-6)
    config, _ = read_config(finished / "config.json")
    abstract = abstract_params(make_model(config.model, config.dtype))
    loaded, step = load_params(finished, abstract, make_mesh(1))
    state = state_of(finished)
    blended = (np.asarray(state.params["head"]) + np.asarray(state.opt_state.average["head"])) / 2
    np.testing.assert_allclose(loaded["head"], blended, rtol=1e-6)
    assert step == STEPS and np.any(loaded["head"] != state.params["head"])
    np.testing.assert_array_equal(loaded["embedding"], state.params["embedding"])  # not averaged


def test_damaged_weights_read_out_are_noticed(tmp_path):
    """Also where the parameters are whole; a checkpoint without any holds the parameters alone."""
    params = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    state = TrainState(jnp.int32(1), params, {"m": jnp.zeros(2)})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with Checkpoints(tmp_path / "c", 9) as checkpoints:
        checkpoints.save(1, state, {})
        for step in (2, 3):
            checkpoints.save(step, state, {}, readout=jax.tree.map(lambda x, more=step: x + more, params))
        assert_same_bits(checkpoints.restore_params(1, abstract, make_mesh(1)), params)
        assert float(checkpoints.restore_params(2, abstract, make_mesh(1))["a"][0]) == 3
    shutil.rmtree(tmp_path / "c/2/readout")
    shutil.copytree(tmp_path / "c/3/readout", tmp_path / "c/2/readout")
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 2 in .* is damaged: its checksums do not match"):
            checkpoints.restore_params(2, abstract, make_mesh(1))
        restored, _ = checkpoints.restore(
            2, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state), make_mesh(1)
        )
        assert_same_bits(restored, state)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_batch_of_each_stage_lies_on_the_devices_whole(devices):
    for stage in Plan(staged()).stages:
        rows = random_sequences(stage.sequences, stage.seq_len)
        placed = place_batch(make_mesh(devices), rows, 1)
        assert placed.shape == (1, stage.sequences, stage.seq_len + 1)
        np.testing.assert_array_equal(np.asarray(placed)[0], rows)


def test_the_rate_and_the_weights_reach_optimiser_and_model_in_one_program():
    """Half the rate, half the step; twice the weight of the loss, twice the loss. Their values compile nothing."""

    class Weighted:
        """The tiny model's loss times the first of the weights."""

        def __init__(self):
            self.inner = tiny_model(layers=LayerSchedule(1, 0, 0, 1))

        def apply(self, variables, inputs, targets, window, *, loss_weights=None):
            loss = self.inner.apply(variables, inputs, targets, window)
            return loss if loss_weights is None else loss * loss_weights[0]

    model, mesh, optimizer = Weighted(), make_mesh(1), scale_by_rate(lambda step: 1.0)
    before = jax.tree.map(np.asarray, random_params(model.inner))
    batch = place_batch(mesh, random_sequences(2, 128), 1)
    train_step = make_train_step(model, optimizer, mesh)

    def moved(*inputs):
        state = TrainState(jnp.int32(0), jax.tree.map(np.array, before), optimizer.init(before))
        state, metrics = train_step(jax.device_put(state, replicated(mesh)), batch, np.int32(1), *inputs)
        return before["head"] - np.asarray(state.params["head"]), float(metrics.loss)

    rounding = 2 * np.finfo(np.float32).eps * np.abs(before["head"]).max()
    plain, loss = moved()
    for weight, rate in ((1, 1), (2, 1), (1, 0.5)):
        weights = np.array([weight, 3], np.float32)
        step, weighted = moved(weights, np.float32(rate))
        np.testing.assert_allclose(step, weight * rate * plain, rtol=1e-4, atol=rounding)
        assert weighted == pytest.approx(weight * loss, rel=1e-6)
    assert train_step._cache_size() == 2


def test_a_profile_is_that_of_one_stage(monkeypatch, tmp_path, capsys):
    """And says which."""
    monkeypatch.setitem(PRESETS, "staged", staged)
    profile(["staged", "--stage=0", "--profile-steps=1", "--warmup=0", f"--json={tmp_path / 'p.json'}"])
    assert "steps of stage 0 (0 to 1) of 512 tokens" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "p.json").read_text())["report"]
    assert (report["stage"], report["tokens_per_step"], report["seq_len"]) == (0, 512, 128)


def test_a_stage_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "staged", staged)
    with pytest.raises(UserError, match="--stage is 2; the run has stages 0 to 1"):
        profile(["staged", "--stage=2"])
