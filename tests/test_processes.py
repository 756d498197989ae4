"""A run of two processes with four devices each: the same training as one process with eight, stopped as one."""

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
    "demo", "--model.dim=16", "--model.num-heads=2", f"--steps={STEPS}", "--batch-tokens=2048", "--seq-len=256",
    "--final-window-tokens=256", "--data.val-tokens=1024", "--data.val-seq-len=512", "--val-every=0",
    # The first gradients of the scalars are rounding noise, which Adam turns into whole steps: another order of sums
    # would be another run.
    "--optimizer.scalar-lr=0",
]  # fmt: skip
PROGRAM = f"""
import sys, jax
jax.config.update("jax_num_cpu_devices", {DEVICES})
from senano_jax import train
from senano_jax.errors import one_line_errors
with one_line_errors():
    train.main(sys.argv[1:])
"""


def launch_all(flags):
    """Starts the processes with `flags`, connected over a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(PROCESSES)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags],
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
    cache = f"--compilation-cache={tmp_path / 'xla'}"
    alone, together = tmp_path / "alone", tmp_path / "together"
    train.main([*FLAGS, f"--devices={PROCESSES * DEVICES}", cache, f"--run-dir={alone}"])

    processes = launch_all([*FLAGS, cache, f"--run-dir={together}"])
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


def test_processes_that_would_not_share_a_run_folder_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    with pytest.raises(UserError, match="a run of several processes needs --run-dir"):
        train.main(FLAGS)
