"""A run that was stopped goes on as if nothing had happened, or says in one line why it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from event_files import shown_scalars

from senano_jax import evaluate, train
from senano_jax.config_file import read_config
from senano_jax.data import sample
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.model.build import make_model
from senano_jax.optim.recipe import make_optimizer
from senano_jax.runlog.writer import RunFolder
from senano_jax.training import loop
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import DATA_AXIS, make_mesh
from senano_jax.training.resume import restore
from senano_jax.training.state import abstract_state, init_state

STEPS, BATCH = 6, 512
SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    f"--steps={STEPS}", f"--batch-tokens={BATCH}", "--seq-len=256", "--final-window-tokens=256",
    "--data.val-tokens=256", "--data.val-seq-len=256", "--val-every=3", "--devices=1", "--checkpoint-every=2",
    "--checkpoint-keep=9", "--tensorboard",
]  # fmt: skip
TIMES = ("step_ms", "tokens_per_s", "train_time_ms")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to, with checkpoints of steps 2, 4 and 6."""
    return train.main([*SMALL, f"--run-dir={tmp_path_factory.mktemp('runs') / 'run'}"])


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "run")


@pytest.fixture
def signal_at(monkeypatch):
    """Makes the next run get SIGTERM when it comes to step `step`."""

    def plan(step):
        real = loop.place_batch
        passed = []

        def place(*args):
            if len(passed) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            passed.append(args)
            return real(*args)

        monkeypatch.setattr(loop, "place_batch", place)

    return plan


def resume(run_dir, *flags):
    return train.main([*SMALL, f"--run-dir={run_dir}", *(flags or ["--resume"])])


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def abstract_of(run_dir):
    config, _ = read_config(run_dir / "config.json")
    return abstract_state(
        make_model(config.model, config.dtype), make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    )


def state_of(run_dir, step=STEPS, devices=1):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(step, abstract_of(run_dir), make_mesh(devices))[0]


def steps_of(run_dir):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_run(run_dir, undisturbed):
    assert records(run_dir) == records(undisturbed)
    assert len((run_dir / "log.txt").read_text().splitlines()) == len(
        (undisturbed / "log.txt").read_text().splitlines()
    )
    assert_same_bits(state_of(run_dir), state_of(undisturbed))
    assert curves(run_dir) == curves(undisturbed)


def curves(run_dir):
    """What TensorBoard shows, each point once."""
    scalars = [p for axis in ("steps", "tokens") for p in shown_scalars(run_dir / "tensorboard" / axis)]
    return [point for point in scalars if point[0] not in TIMES]


def losses(run_dir):
    return {r["step"]: r["loss"] for r in records(run_dir) if "loss" in r}


def damage(run_dir, step, how):
    """Harms the checkpoint of `step`: its largest file of weights is cut, changed in one bit, or gone."""
    file = max(
        (run_dir / "checkpoints" / str(step) / "params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
    )
    if how == "removed":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize(("signalled", "stopped"), [(0, 2), (2, 3), (3, 5)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(signalled, stopped, undisturbed, tmp_path, signal_at, capsys):
    """Whether it stops where an evaluation is due or in between; its folder is all that it takes."""
    signal_at(signalled)
    run = train.main([*SMALL, "--checkpoint-every=0", f"--run-dir={tmp_path / 'run'}"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"SIGTERM: stopped after step {stopped}, saved; resume with: " in said
    assert f"python -m senano_jax.train --run-dir {run} --resume" in said
    assert steps_of(run) == [stopped]
    assert not (run / "checkpoints" / str(stopped) / "metrics").exists()
    assert [r["step"] for r in records(run) if "loss" in r] == list(range(1, stopped + 1))
    train.main(["--run-dir", str(run), "--resume"])
    assert_same_run(run, undisturbed)
    val_losses = {r["step"]: r["val_loss"] for r in records(run) if "val_loss" in r}
    stored = run / "checkpoints" / str(stopped) / "metrics" / "metrics"
    assert stored.exists() == (stopped in val_losses)
    assert not stored.exists() or json.loads(stored.read_text()) == {"val_loss": val_losses[stopped]}


def test_a_signal_during_the_last_step_costs_nothing(undisturbed, tmp_path, signal_at):
    """Whether or not the run still evaluates, resuming it leaves the whole record."""
    signal_at(STEPS - 1)
    run = train.main([*SMALL, f"--run-dir={tmp_path / 'run'}"])
    resume(run)
    assert_same_run(run, undisturbed)


def test_a_finished_run_stays_as_it_is(copy, undisturbed):
    resume(copy)
    assert_same_run(copy, undisturbed)
    assert steps_of(copy) == [6, 4, 2]


@pytest.mark.parametrize("step", [2, 4])
def test_an_earlier_checkpoint_can_be_chosen(step, copy, undisturbed):
    """The steps after it are done again, recorded once and saved again."""
    later = copy / "checkpoints" / str(STEPS) / "commit_success.txt"
    old = later.stat().st_mtime_ns
    resume(copy, f"--resume={step}")
    assert_same_run(copy, undisturbed)
    assert steps_of(copy) == [6, 4, 2]
    assert later.stat().st_mtime_ns > old


def test_going_back_forgets_the_later_checkpoints_at_once(copy, undisturbed, monkeypatch):
    """Otherwise a kill before the next save would leave a checkpoint ahead of metrics.jsonl."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "TokenStream", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(copy, "--resume=2")
    assert steps_of(copy) == [2]
    resume(copy)
    assert_same_run(copy, undisturbed)


def test_a_step_without_checkpoint_is_refused(copy):
    with pytest.raises(UserError, match=r"--resume 3: there is no checkpoint of this step; there are: 2, 4, 6$"):
        resume(copy, "--resume=3")


def test_the_environment_of_every_part_is_kept(tmp_path):
    """A damaged one is dropped."""
    file, first = tmp_path / "environment.json", {"command": "first"}
    file.write_text(json.dumps(first))
    for parts in (1, 2):
        with RunFolder(tmp_path) as folder:
            folder.go_on({"metrics": 0, "log": 0})
        environment = json.loads(file.read_text())
        assert environment["earlier"][0] == first and len(environment["earlier"]) == parts
    for damaged in (b"[1]", b'{"earlier": 3}', b"\xff", b"[" * 100_000):
        file.write_bytes(damaged)
        with RunFolder(tmp_path) as folder:
            folder.go_on({"metrics": 0, "log": 0})
        assert "earlier" not in json.loads(file.read_text())


def test_another_number_of_devices(tmp_path):
    """From 1 to 8 and back: the state is the same bit for bit; the next loss is the same up to the order of sums."""
    batch = ["--batch-tokens=1024", "--seq-len=128", "--final-window-tokens=128"]  # a sequence for each
    on_one = train.main([*SMALL, *batch, f"--run-dir={tmp_path / 'one'}"])
    copy = shutil.copytree(on_one, tmp_path / "run")
    resume(copy, "--resume=2", *batch, "--devices=8")
    assert records(copy)[:3] == records(on_one)[:3]
    on_eight = losses(copy)
    assert on_eight[3] == pytest.approx(losses(on_one)[3], rel=1e-5)
    assert_same_bits(state_of(copy, 4, devices=8), state_of(copy, 4, devices=1))
    assert len(state_of(copy, 4, devices=8).step.sharding.device_set) == 8
    resume(copy, "--resume=4", *batch, "--devices=1")
    assert losses(copy) | {6: 0} == on_eight | {5: pytest.approx(on_eight[5], rel=1e-5), 6: 0}
    assert losses(copy)[6] == pytest.approx(on_eight[6], rel=0.02)  # rounding grows quickly in a model this small


def test_other_micro_batches(copy, undisturbed):
    resume(copy, "--resume=4", "--micro-batches=2")
    assert [r["step"] for r in records(copy)] == [r["step"] for r in records(undisturbed)]
    assert losses(copy)[5] == pytest.approx(losses(undisturbed)[5], rel=1e-5)


def test_another_configuration_is_refused_and_named(copy):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        resume(copy, "--resume", "--seed=1", "--optimizer.matrices.rate=0.1")
    message = str(caught.value)
    assert "another configuration (" in message and "\n" not in message
    assert "optimizer.matrices.rate 0.05 -> 0.1" in message and "seed 0 -> 1" in message and "dim" not in message
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_other_shards_are_refused_and_the_shard_named(copy, tmp_path):
    """Here with as many tokens as before, as all shards of FineWeb have."""
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    tokens = open_shard(sample.TRAIN)
    write_shard(tmp_path / "sample_train.bin", np.roll(tokens, 1))
    message = f"--resume: train shard 1, {tmp_path / 'sample_train.bin'}, has sha256 "
    with pytest.raises(UserError, match=message):
        resume(copy, "--resume=4", f"--data.train-files={tmp_path}/*.bin")
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_a_damaged_newest_checkpoint_is_passed_over(how, copy, undisturbed, capsys):
    damage(copy, STEPS, how)
    resume(copy)
    said = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint {STEPS} in {copy / 'checkpoints'}" in said and "going back to that of step 4" in said
    assert f"kept as {copy / 'checkpoints' / f'unread-{STEPS}'} what could not be read" in said
    assert_same_run(copy, undisturbed)
    assert steps_of(copy) == [6, 4, 2]


def test_a_checkpoint_that_cannot_be_read_once_is_not_lost(copy):
    """Nor the second time: each keeps a name of its own, which no reader takes for a checkpoint."""
    for name in ("unread-6", "unread-6-2"):
        with Checkpoints(copy / "checkpoints", keep_latest=9) as checkpoints:
            assert checkpoints.set_aside_after(4) == [copy / "checkpoints" / name]
            assert checkpoints.steps() == [4, 2]
        shutil.copytree(copy / "checkpoints" / name, copy / "checkpoints" / "6")
    assert_same_bits(state_of(copy), state_of(copy, 6))


def test_a_checkpoint_of_another_program_is_refused(tmp_path, undisturbed):
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, record | {"next_token": 0, "train_ms": 0.0, "evaluated": False})
        with pytest.raises(UserError, match=r"checkpoint 1 does not say .* \(its record lacks run_folder\); use"):
            restore(checkpoints, "latest", abstract_of(undisturbed), make_mesh(1), print)


def test_a_checkpoint_saved_in_haste_gets_its_validation_loss_later(tmp_path, undisturbed):
    """And can then be the best."""
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, state, record, 3.0)
        checkpoints.save(2, state, record)
        checkpoints.add_loss(2, 2.0)
        checkpoints.save(3, state, record)
        checkpoints.save(4, state, record, 2.5)
        assert checkpoints.steps() == [4, 2]
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(5, state, record)
        assert checkpoints.steps() == [5, 2]


def test_when_all_checkpoints_are_damaged_it_says_so(copy):
    for step in (2, 4, 6):
        damage(copy, step, "flipped")
    with pytest.raises(UserError, match=r"checkpoint 2 in .* (damaged|cannot be read)") as caught:
        resume(copy)
    assert "\n" not in str(caught.value)
    assert steps_of(copy) == [6, 4, 2], "nothing is deleted where nothing was restored"


@pytest.mark.parametrize(
    ("old", "new"), [(b'"next_token": ', b'"next_token": 1'), (b'"evaluated": true', b'"evaluated": null')]
)
def test_a_changed_record_is_noticed(old, new, copy):
    """It holds the position in the stream: the arrays' checksums say nothing about it."""
    file = copy / "checkpoints" / str(STEPS) / "record" / "metadata"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="damaged: the checksum of its record does not match"):
        state_of(copy)


@pytest.mark.parametrize("loss", [b"", b"[]", b'{"val_loss": "x"}', b'{"val_loss": NaN}', b"\xff{", b"[" * 100_000])
def test_a_damaged_validation_loss_costs_only_itself(loss, copy, undisturbed):
    (copy / "checkpoints" / str(STEPS) / "metrics" / "metrics").write_bytes(loss)
    with Checkpoints(copy / "checkpoints", keep_latest=9) as checkpoints:
        assert checkpoints.steps() == [6, 4, 2]
        assert_same_bits(checkpoints.restore(STEPS, abstract_of(copy), make_mesh(1))[0], state_of(undisturbed))


def test_damaged_weights_are_not_evaluated(copy):
    damage(copy, STEPS, "flipped")
    with pytest.raises(UserError, match=f"checkpoint {STEPS} in .* (damaged|cannot be read)"):
        evaluate.main([str(copy)])


def test_a_damaged_array_is_found_by_its_checksum(tmp_path, undisturbed):
    """Also where the file format itself notices nothing: here the array is damaged before it is written."""
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, record)
        assert_same_bits(checkpoints.restore(1, abstract_of(undisturbed), make_mesh(1))[0], state)
    other = state._replace(params={**state.params, "skip_weights": state.params["skip_weights"] + 1})
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(1, other, record)
        checkpoints.steps()
    shutil.rmtree(tmp_path / "checkpoints/1/params")
    shutil.copytree(tmp_path / "other/1/params", tmp_path / "checkpoints/1/params")
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 1 in .* is damaged: its checksums do not match"):
            checkpoints.restore(1, abstract_of(undisturbed), make_mesh(1))
        with pytest.raises(UserError, match=r"checkpoint 1 in .* is damaged: its checksums do not match"):
            checkpoints.restore_params(1, abstract_of(undisturbed).params, make_mesh(1))


def init_state_of(run_dir):
    config, _ = read_config(run_dir / "config.json")
    optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    return init_state(make_model(config.model, config.dtype), optimizer, 0, make_mesh(1)), {"step": 1}


def test_a_run_killed_before_its_first_checkpoint_starts_over(copy, undisturbed, capsys):
    shutil.rmtree(copy / "checkpoints")
    resume(copy)
    assert "from step" not in capsys.readouterr().out
    assert_same_run(copy, undisturbed)


def test_lines_written_after_the_checkpoint_are_done_again(copy, undisturbed):
    """As a kill leaves them: more steps than were saved, the last line half written."""
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    resume(copy)
    assert_same_run(copy, undisturbed)


def test_a_shortened_record_of_the_run_is_not_continued(copy):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    os.truncate(copy / "metrics.jsonl", 100)
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than when the checkpoint was saved"):
        resume(copy)


def test_one_run_at_a_time_uses_a_folder(copy, undisturbed):
    with RunFolder(copy):
        for flags in (["--resume"], ["--resume=2"]):
            with pytest.raises(UserError, match=f"--run-dir {copy} is in use by another process; choose another"):
                resume(copy, *flags)
    resume(copy)
    assert_same_run(copy, undisturbed)


def test_a_dead_process_does_not_keep_the_folder(tmp_path):
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="in use by another process"), RunFolder(tmp_path):
            pass
        process.kill()
    with RunFolder(tmp_path):
        pass


def test_reading_the_weights_of_a_living_run_does_not_disturb_it(copy):
    """A save under way is a temporary folder, which only the run itself may clean up."""
    under_way = copy / "checkpoints" / "8.orbax-checkpoint-tmp"
    under_way.mkdir()
    (under_way / "part").write_text("")
    assert evaluate.main([str(copy)]) > 0
    assert (under_way / "part").exists()
    resume(copy)
    assert not under_way.exists()


@pytest.mark.parametrize(
    ("latest", "every", "losses", "kept"),
    [
        (1, 0, {}, [9]),
        (2, 0, {}, [9, 8]),
        (2, 0, {2: 3.0, 3: 1.0, 5: 2.0, 6: 2.5}, [9, 8, 3]),
        (1, 4, {}, [9, 8, 4]),
        (2, 3, {1: 1.5, 2: 1.5001, 7: 4.0}, [9, 8, 6, 3, 1]),
    ],
)
def test_the_newest_the_best_and_every_kth_are_kept(latest, every, losses, kept, tmp_path, undisturbed):
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path, latest, every) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, state, record, losses.get(step))
        assert checkpoints.steps() == kept
    with Checkpoints(tmp_path, latest, every) as checkpoints:
        assert checkpoints.steps() == kept
