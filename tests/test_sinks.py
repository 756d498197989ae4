"""Curves outside the run folder: what arrives there, what a resumed run adds, and what a failing tool costs."""

import dataclasses
import sys
import types

import pytest
from event_files import shown_scalars

from senano_jax import train
from senano_jax.errors import UserError
from senano_jax.presets import demo
from senano_jax.runlog import sinks
from senano_jax.runlog.sinks import Sinks, TensorBoard

BATCH = demo().batch_tokens


def config(**flags):
    return dataclasses.replace(demo(), **flags)


def step(n, loss=5.0):
    figures = {"loss": loss, "grad_norm": 0.5, "lr": 1.0, "momentum": 0.875, "window": 2, "tokens_per_s": 64.0}
    return {"step": n, "tokens_trained": n * BATCH, "tokens_read": n * BATCH, "step_ms": 1.0} | figures


def evaluation(n, val_loss=4.5):
    return {"step": n, "tokens_trained": n * BATCH, "val_loss": val_loss, "window": 3, "train_time_ms": 1.0}


def write(folder, first_step, *records, said=None, failure=None, **flags):
    """One part of a run, which `failure` ends if there is one."""
    with Sinks(config(**flags)).open(folder, first_step, [].append if said is None else said.append) as opened:
        for record in records:
            opened.write(record)
        if failure is not None:
            raise failure


def test_without_a_flag_nothing_is_opened(tmp_path):
    write(tmp_path, 0, step(1), evaluation(1))
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_steps_and_evaluations(tmp_path):
    """Every figure over steps, the losses also over tokens."""
    write(tmp_path, 0, evaluation(0, 10.75), step(1, 9.5), evaluation(1, 8.0), tensorboard=True)
    assert shown_scalars(tmp_path / "tensorboard" / "steps") == [
        ("val_loss", 0, 10.75),
        *[("loss", 1, 9.5), ("grad_norm", 1, 0.5), ("lr", 1, 1.0), ("momentum", 1, 0.875)],
        *[("window", 1, 2.0), ("tokens_per_s", 1, 64.0)],
        ("val_loss", 1, 8.0),
    ]
    assert shown_scalars(tmp_path / "tensorboard" / "tokens") == [
        ("val_loss_over_tokens", 0, 10.75),
        ("loss_over_tokens", BATCH, 9.5),
        ("val_loss_over_tokens", BATCH, 8.0),
    ]


def test_what_an_optimiser_does_not_have_is_left_out(tmp_path):
    """AdamW has no momentum to log."""
    write(tmp_path, 0, {name: value for name, value in step(1).items() if name != "momentum"}, tensorboard=True)
    names = [name for name, _, _ in shown_scalars(tmp_path / "tensorboard" / "steps")]
    assert names == ["loss", "grad_norm", "lr", "window", "tokens_per_s"]


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_tensorboard_shows_a_point_once_whatever_a_run_repeats(checkpoint, tmp_path):
    """It was killed after step 3 and goes on from a checkpoint, or from the beginning."""
    records = [evaluation(0), step(1), step(2), evaluation(2), step(3), step(4)]
    write(tmp_path, 0, *records[:5], tensorboard=True)
    write(tmp_path, checkpoint, *[r for r in records if not checkpoint or r["step"] > checkpoint], tensorboard=True)
    write(tmp_path / "undisturbed", 0, *records, tensorboard=True)
    for axis in ("steps", "tokens"):
        folder = tmp_path / "tensorboard" / axis
        assert shown_scalars(folder) == shown_scalars(tmp_path / "undisturbed" / "tensorboard" / axis)
        assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("flag", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_anything_happens(flag, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"--{flag} needs {package} \(.*\); run: pip install 'senano-jax\[tracking\]'"
    with pytest.raises(UserError, match=message):
        train.main(["demo", f"--{flag}", "--devices=1", f"--run-dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_sink_that_cannot_be_opened_ends_the_run_before_it_begins(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"--tensorboard cannot be started .*; make room, or drop the flag") as caught:
        write(tmp_path, 0, step(1), tensorboard=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_sink_that_fails_later_is_left_out_with_one_warning(method, tmp_path, monkeypatch):
    calls = []

    def fail(self, argument):
        calls.append(argument)
        raise OSError("no space left\non device")

    monkeypatch.setattr(TensorBoard, method, fail)
    said = []
    write(tmp_path, 0, step(1), step(2), said=said, tensorboard=True)
    assert len(calls) == len(said) == 1
    assert said[0].startswith("--tensorboard ") and "(no space left on device)" in said[0]


class StandIn(types.ModuleType):
    """W&B's interface as far as it is used, with its server's memory: points and the counter of each run by id."""

    Settings = dict

    def __init__(self):
        super().__init__("wandb")
        self.points, self.ended = {}, []

    def init(self, *, id, **settings):
        assert settings["resume"] == "allow"
        self.id = id or f"run{len(self.points)}"
        self.points.setdefault(self.id, {})
        return self

    @property
    def step(self):
        return max(self.points[self.id], default=-1) + 1

    def define_metric(self, name, step_metric):
        assert step_metric == "step"

    def log(self, values, step, commit):
        assert commit and step >= self.step, "W&B would drop it, with a warning"
        self.points[self.id][step] = values

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_wandb_gets_a_point_once_whatever_a_run_repeats(checkpoint, tmp_path, monkeypatch):
    """The parts share one id. An evaluation that the first part stopped before is not lost."""
    server = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", server)
    records = [evaluation(0), step(1), step(2), evaluation(2), step(3), step(4)]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 0, *records[:3], failure=KeyboardInterrupt(), wandb=True)
    write(tmp_path, checkpoint, *records[3 if checkpoint else 0 :], wandb=True)
    write(tmp_path, 0, *records[:2], wandb=True)
    assert list(server.points) == ["run0"]
    points = list(server.points["run0"].values())
    assert [(p["step"], p.get("val_loss", p.get("loss"))) for p in points] == [
        (r["step"], r.get("val_loss", r.get("loss"))) for r in records
    ]
    assert points[1] == {name: value for name, value in step(1).items() if name not in ("tokens_read", "step_ms")}
    assert server.ended == [1, 0, 0]


def test_wandb_itself_takes_the_points_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed: pip install 'senano-jax[tracking]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for first_step, records in ((0, [evaluation(0), step(1, 9.5), evaluation(1, 8.0)]), (1, [step(2, 7.5)])):
        with Sinks(config(wandb=True)).open(tmp_path, first_step, pytest.fail) as opened:
            for record in records:
                opened.write(record)
            ids.append(wandb.run.id)
            newest = {name: value for record in records for name, value in record.items()}
            for name in ("step", "tokens_trained", *sinks.LOSSES):
                assert wandb.run.summary.get(name) == newest.get(name)
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
