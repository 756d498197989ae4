"""Two processes with two devices each: the same training as one process with four, and one mind in all else."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import kept_programs
import pytest

from senano_jax import train
from senano_jax.errors import UserError
from senano_jax.training.processes import cause_first

one_trace = kept_programs.one_trace  # for all tests here

PROCESSES, DEVICES, STEPS = 2, 2, 8  # a step takes as long as it has devices: each has its own head and optimiser
FLAGS = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    f"--steps={STEPS}", "--batch-tokens=512", "--seq-len=128",
    "--final-window-tokens=128", "--data.val-tokens=512", "--data.val-seq-len=128", "--val-every=0",
    # The first gradients of the scalars are rounding noise, which Adam turns into whole steps: another order of sums
    # would be another run.
    "--optimizer.scalars.rate=0",
]  # fmt: skip
# Two checkpoints, of which one process cannot read the newer.
GOING_BACK = """
import sys
from pathlib import Path
import jax, numpy as np
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import make_mesh, replicated
from senano_jax.training.processes import join_processes
from senano_jax.training.resume import Bookmark, restore
from senano_jax.training.state import TrainState

join_processes()
mesh = make_mesh(None)
state = jax.device_put(TrainState(np.int32(0), {"a": np.ones(3)}, {"b": np.zeros(2)}), replicated(mesh))
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, Bookmark(step, 0, 0.0, False, {})._asdict())
    read = checkpoints._reader.restore
    def fail_in_one(path, **items):
        if jax.process_index() == 1 and path.name == "2":
            raise OSError("stale file handle")
        return read(path, **items)
    checkpoints._reader.restore = fail_in_one
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    position = restore(checkpoints, "latest", abstract, mesh, lambda line: print(line, file=sys.stderr))[1]
    aside = checkpoints.set_aside_after(position.step)
    print(position.step, [path.name for path in aside], checkpoints.steps())
"""


def launch_all(*command, devices=DEVICES, of_one=()):
    """Starts the processes with `command`, connected over a free port of this machine; `of_one` are more arguments of
    process 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(PROCESSES),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command, *(of_one if index == 1 else ())],
            env={**os.environ, **shared, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]


def finish(processes):
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == 0, f"{out}\n{err}"
    return [out for out, _ in outputs]


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_two_processes_train_like_one_stop_together_and_go_on_as_one(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    train.main([*FLAGS, f"--devices={PROCESSES * DEVICES}", f"--run-dir={alone}"])

    processes = launch_all("-m", "senano_jax.train", *FLAGS, f"--run-dir={together}")
    deadline = time.monotonic() + 200
    while not (together / "metrics.jsonl").exists() or len(losses(together)) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), "no step was finished"
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)  # only one of them hears of it
    first, second = finish(processes)
    assert "resume with: python -m senano_jax.train" in first
    assert "step:" not in second, "one process speaks for all"
    stopped = max(losses(together))
    assert 2 <= stopped <= STEPS
    assert [p.name for p in (together / "checkpoints").iterdir()] == [str(stopped)]

    train.main(["--run-dir", str(together), "--resume", f"--devices={PROCESSES * DEVICES}"])
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)


def test_what_one_process_refuses_all_refuse(tmp_path):
    """Only process 0 looks into the folder; the other would wait for it in vain."""
    (tmp_path / "config.json").write_text("")
    for process in launch_all("-m", "senano_jax.train", *FLAGS, f"--run-dir={tmp_path}"):
        _, said = process.communicate(timeout=240)
        assert process.returncode == 2
        assert f"error: --run-dir {tmp_path} holds a run already; choose another folder, or add --resume\n" in said
        assert "Traceback" not in said


def test_processes_that_would_run_different_programs_are_refused(tmp_path):
    flags = ["-m", "senano_jax.train", *FLAGS, f"--run-dir={tmp_path / 'run'}"]
    for process in launch_all(*flags, of_one=[f"--steps={STEPS + 1}"]):
        _, said = process.communicate(timeout=240)
        assert (process.returncode, said) == (
            2,
            f"error: process 1 differs from process 0 in steps ({STEPS + 1}, not {STEPS}); "
            "start all with the same code, flags and number of devices\n",
        )
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
    processes = launch_all("-c", GOING_BACK, str(tmp_path / "checkpoints"))
    for process, moved in zip(processes, (["unread-2"], [])):
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert out.splitlines()[-1] == f"1 {moved} [1]"  # after what gloo says
        assert "cannot be read: stale file handle; going back to that of step 1" in said
    assert (tmp_path / "checkpoints" / "unread-2" / "params").is_dir()


def test_processes_that_would_not_share_a_run_folder_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    with pytest.raises(UserError, match="a run of several processes needs --run-dir"):
        train.main(FLAGS)


LAUNCHER = Path(__file__).parents[1] / "scripts" / "train_processes.py"
# `python -m senano_jax.train`, with a process that dies at a step, and less patience with the silent; if asked to,
# after a run in another folder that nothing disturbs.
DYING = """
import os, signal, sys
from senano_jax import train
from senano_jax.training import processes
from senano_jax.training.recorder import Recorder

processes._SILENCE_S = 4
victim, last_step, run_dir, undisturbed, *arguments = sys.argv[1:]
if undisturbed:
    processes.join_processes(run_dir)
    processes.join_processes = lambda run_dir: None
    train.main([*arguments, "--run-dir", undisturbed])
queued = Recorder.queued
def dying(recorder, step):
    if (processes.jax.process_index(), step.step) == (int(victim), int(last_step)):
        os.kill(os.getpid(), signal.SIGKILL)
    queued(recorder, step)
Recorder.queued = dying
train.command([*arguments, "--run-dir", run_dir])
"""
# Process 1 stops answering, and keeps its connections; the other waits in a collective.
SILENT = """
import os, signal, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from senano_jax.training import processes

processes._SILENCE_S = 4
processes.join_processes()
multihost_utils.process_allgather(np.zeros(1))
if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
multihost_utils.process_allgather(np.ones(1))
"""
SMALL = [*FLAGS, "--steps=4", "--batch-tokens=256", "--checkpoint-every=1"]


def test_a_run_whose_processes_die_goes_on_to_the_same_losses(tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    resume = f"python -m senano_jax.train --run-dir {run} --resume"
    one_gone = "process 1 of this run is gone"
    first_gone = "process 0 of this run, which connects the others, is gone or out of reach"
    for victim, step, arguments, what in (  # at step 3 the checkpoint of step 1 is whole
        (1, 3, [str(undisturbed), *SMALL], one_gone),
        (0, 4, ["", "--resume"], first_gone),
    ):
        processes = launch_all("-c", DYING, str(victim), str(step), str(run), *arguments, devices=1)
        _, said = processes[1 - victim].communicate(timeout=240)
        processes[victim].communicate(timeout=240)
        assert processes[victim].returncode == -signal.SIGKILL
        assert processes[1 - victim].returncode != 0
        assert said == f"error: {what}; resume with: {resume}\n"

    ended = subprocess.run(
        [sys.executable, LAUNCHER, "--processes=2", "--", "--run-dir", run, "--resume"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert ", from step " in ended.stdout
    assert losses(run) == losses(undisturbed)
    assert max(losses(run)) == 4


@pytest.mark.parametrize(
    ("message", "told_by", "several", "waited"),
    [
        ("UNKNOWN: Gloo AllGather failed", None, True, 1),
        ("Barrier failed", UserError("a checkpoint could not be saved"), True, 1),
        ("UNKNOWN: Gloo AllGather failed", None, False, 0),
        ("RESOURCE_EXHAUSTED: out of memory", None, True, 0),
    ],
)
def test_a_failure_between_processes_waits_for_its_cause(monkeypatch, message, told_by, several, waited):
    """And if there is none, it is told in the end."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    sleeps = []
    monkeypatch.setattr(time, "sleep", sleeps.append)

    def fail():
        try:
            raise ValueError(message)
        except ValueError as error:
            raise (told_by or error) from None

    with pytest.raises(UserError if told_by else ValueError), cause_first():
        fail()
    assert len(sleeps) == waited


def test_a_collective_does_not_wait_for_ever(tmp_path):
    waiting, silent = launch_all("-c", SILENT)
    _, said = waiting.communicate(timeout=240)
    silent.kill()
    silent.communicate()
    assert waiting.returncode != 0
    assert said == "error: process 1 of this run is gone; start all processes again\n"
