"""Two processes with four devices each: the same training as one process with eight, and one mind in all else."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from senano_jax import train
from senano_jax.errors import UserError

PROCESSES, DEVICES, STEPS = 2, 4, 10
FLAGS = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    f"--steps={STEPS}", "--batch-tokens=2048", "--seq-len=256",
    "--final-window-tokens=256", "--data.val-tokens=1024", "--data.val-seq-len=512", "--val-every=0",
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


def launch_all(*command):
    """Starts the processes with `command`, connected over a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(PROCESSES),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
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
