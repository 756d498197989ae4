"""The queue of ablations: whatever ends a job or the queue costs no run."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate as ablate_script
import pytest
from ablation import report, results, runner, runs
from ablation.study import read_study
from faults.comparison import records
from tiny_study import SCRIPTS, TINY, Command, output_of, times_of

from senano_jax.config import changed
from senano_jax.errors import UserError
from senano_jax.training.loop import train


@pytest.fixture
def ablate():
    with Command() as command:
        yield command


# Runs of 20 steps, most of them after the first checkpoint.
SHORT = TINY.replace("tokens = 5120", "tokens = 2560").replace(
    "val_tokens = 512, val_seq_len = 256", "val_tokens = 128, val_seq_len = 128"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study whose runs take seconds."""
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(SHORT)
    return path


def until(condition, process):
    """What `condition` returns once it is true, while the process runs."""
    while not (value := condition()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    return value


def process_of(queue, name):
    """The child of the queue that writes the output of this run."""
    for pid in Path(f"/proc/{queue.pid}/task/{queue.pid}/children").read_text().split():
        if os.readlink(f"/proc/{pid}/fd/1").endswith(f"/{name}.txt"):
            return int(pid)
    return None


def saved_but_not_finished(root, names):
    """One of these runs that has a checkpoint and is far from its end."""
    for name in names:
        steps = [int(path.name) for path in (root / name / "checkpoints").glob("*") if path.name.isdigit()]
        if steps and max(steps) < 12:
            return name
    return None


def files_of(folder):
    """Their times, but for checkpoints: a queue that is killed may not have deleted those of a finished run yet."""
    return {name: time_ns for name, time_ns in times_of(folder).items() if name != "checkpoints"}


NAMES = ("base-seed0", "slow-seed0", "base-seed1", "slow-seed1")


def test_neither_a_killed_job_nor_a_killed_queue_costs_a_run(tiny, tmp_path, ablate):
    """A job is killed, then the queue; the next queue keeps what is finished and resumes the rest, and the losses are
    those of runs that nothing disturbed, bit for bit."""
    root, jobs = tmp_path / "tiny", {job.name: job for job in read_study(tiny).jobs}
    queue = ablate("run", tiny, "--gpus", 2, "--out", tmp_path)
    killed = until(lambda: saved_but_not_finished(root, NAMES), queue)
    os.kill(process_of(queue, killed), signal.SIGKILL)
    until(lambda: runs.finished_run(root, jobs["base-seed0"]) and saved_but_not_finished(root, NAMES[2:]), queue)
    queue.kill()
    output = queue.communicate()[0]
    assert f"{killed}: killed by signal 9, to be started again" in output
    assert f"{killed}: goes on" in output
    done = [name for name, job in jobs.items() if runs.finished_run(root, job)]
    assert 0 < len(done) < 4
    # A run is finished before its process has ended.
    runner.wait_for_earlier_jobs(root, [jobs[name] for name in done], print)
    before = {name: files_of(root / name) for name in done}

    status, output = output_of(ablate("run", tiny, "--gpus", 2, "--out", tmp_path))
    assert status == 0, output
    assert "4 of 4 runs finished" in output
    assert {name: files_of(root / name) for name in done} == before
    resumed = [name for name in jobs if f"{name}: goes on" in output]
    assert resumed
    assert not set(resumed) & set(done)
    for name in {killed, resumed[-1]}:
        undisturbed = {"run_dir": str(tmp_path / name), "devices": 1, "checkpoint_every": 0}
        train(changed(jobs[name].config, undisturbed), "demo")
        assert records(root / name) == records(tmp_path / name)
    final = {name: records(root / name)[-1]["val_loss"] for name in jobs}
    assert len(set(final.values())) == 4
    assert not list(root.glob("*/checkpoints"))
    environment = json.loads((root / "slow-seed1" / "environment.json").read_text())
    assert environment["command"].startswith(f"python {SCRIPTS / 'ablate.py'} run {tiny}")
    status, output = output_of(ablate("status", tiny, "--out", tmp_path))
    assert status == 0
    assert output.count("finished") == 4
    assert f"loss {final['slow-seed1']:.4f}" in output


def test_a_failed_job_is_recorded_and_keeps_no_other_from_running(tmp_path, ablate):
    """One diverges and one lacks a file; neither is tried again unasked, and then with its reason forgotten."""
    path = tmp_path / "bad.toml"
    path.write_text(
        SHORT.replace("tokens = 2560", "tokens = 512").replace("seeds = [0, 1]", "seeds = [3]")
        + 'init_from = "nowhere.pt"\n[[variants]]\nname = "wild"\noptimizer.matrices.rate = 1e38\n'
    )
    status, output = output_of(ablate("run", path, "--gpus", 2, "--out", tmp_path))
    assert status == 1, output
    root, (base, slow, wild) = tmp_path / "tiny", read_study(path).jobs
    assert runs.finished_run(root, base)
    assert "nowhere.pt" in runs.failure(root, slow)
    assert "loss nan" in runs.failure(root, wild) or "loss inf" in runs.failure(root, wild)
    assert "1 of 3 runs finished, 2 failed" in output
    status, output = output_of(ablate("run", path, "--out", tmp_path))
    assert status == 1
    assert "started" not in output
    rows = {
        cells[0]: cells for cells in report.table(read_study(path), results.read_results(read_study(path), root)).rows
    }
    assert rows["`wild`"][4:] == ("failed", "-", "-", "-", "")


def test_a_job_that_was_not_chosen_is_waited_for_too(tiny, tmp_path, monkeypatch):
    """One that a killed queue has left to save has its device until it ends."""
    waited = []
    monkeypatch.setattr(ablate_script, "wait_for_earlier_jobs", lambda root, jobs, say: waited.extend(jobs))
    monkeypatch.setattr(ablate_script.Queue, "run", lambda self: None)
    study = read_study(tiny)
    arguments = argparse.Namespace(
        only="base", gpus=1, per_gpu=1, unpack_to=None, retry=False, time_limit=None, study=tiny, out=tmp_path
    )
    ablate_script.run(arguments, study, tmp_path / "tiny")
    assert waited == list(study.jobs)


def test_the_reason_of_a_failure_is_of_this_attempt(tmp_path):
    output = tmp_path / "run.txt"
    output.write_text("SIGHUP: stopped after step 120, saved\n")
    written = output.stat().st_size
    assert runner._last_line(output, written) == ""
    output.write_text(output.read_text() + "error: no memory\n--------\n")
    assert runner._last_line(output, written) == "error: no memory"


def test_a_time_limit_ends_the_queue_with_the_way_on(tiny, tmp_path, ablate):
    status, output = output_of(ablate("run", tiny, "--time-limit", 1, "--only", "slow", "--out", tmp_path))
    assert status == 0
    assert "time limit: 0 of 2 runs finished, 2 left; go on with: python scripts/ablate.py run" in output, output


def test_under_nohup_the_queue_hears_nothing_of_a_closed_terminal_and_its_jobs_do():
    """They are stopped by the same signal, also while they import, before a line of theirs can say so."""
    says = "import signal; print(signal.getsignal(signal.SIGHUP).name)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runner._noting_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            said = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True).stdout
        assert (said, received, signal.getsignal(signal.SIGHUP)) == ("SIG_DFL\n", [], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_queues_are_kept_out_of_one_folder(tmp_path):
    with runner.locked(tmp_path / "study"):
        with pytest.raises(UserError, match="in use by another queue"), runner.locked(tmp_path / "study"):
            pass
        with runner.locked(tmp_path / "another"):
            pass
    with runner.locked(tmp_path / "study"):
        pass


def test_devices_are_the_gpus_that_may_be_used_or_shares_of_the_cpu(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e1f")
    assert [place.environment for place in runner.devices(None)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "GPU-5e1f"},
    ]
    assert [place.name for place in runner.devices(1)] == ["GPU 2"]
    with pytest.raises(UserError, match="--gpus 3: this machine has 2 GPUs"):
        runner.devices(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [place.platform for place in runner.devices(3)] == ["cpu"] * 3


def test_runs_that_share_a_gpu_share_its_memory_and_the_first_ones_have_one_each(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    places = runner.devices(None, per_gpu=2)
    assert [place.name for place in places] == ["GPU 0 (1 of 2)", "GPU 1 (1 of 2)", "GPU 0 (2 of 2)", "GPU 1 (2 of 2)"]
    for place, gpu in zip(places, "0101", strict=True):
        assert place.environment == {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.460"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="--per-gpu 2: there is no GPU here"):
        runner.devices(None, per_gpu=2)


def test_the_longest_job_is_first_and_of_equals_each_first_seed(tmp_path):
    path = tmp_path / "order.toml"
    path.write_text(
        TINY.replace("seeds = [0, 1]", "seeds = [7, 1]\nbudgets = [1280, 51200]")
        + '[[variants]]\nname = "deep"\nmodel.layers.prelude = 5\nmodel.layers.coda = 5\nmodel.dim = 64\n'
    )
    study = read_study(path)
    queue = runner.Queue(study, tmp_path, study.jobs, [], None, print)
    assert [job.name for job in queue._left] == [
        "base-51200-seed7", "base-51200-seed1", "deep-seed7", "deep-seed1",
        "base-seed7", "slow-seed7", "base-seed1", "slow-seed1", "base-1280-seed7", "base-1280-seed1",
    ]  # fmt: skip
