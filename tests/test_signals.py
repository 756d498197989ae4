"""Signals, closed terminals and screens: a run is saved, and whoever called it is told."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_flags import SMALL, STEPS

from senano_jax import train
from senano_jax.config import LayerSchedule
from senano_jax.presets import demo
from senano_jax.training import loop
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.stop import StopRequest

SLOW_STEP = """
import os, sys, time
from senano_jax import train
from senano_jax.errors import one_line_errors
from senano_jax.training import loop

real = loop.place_batch
count = [0]
def place(*args):
    count[0] += 1
    if count[0] == 3:
        print("READY", flush=True)
        {wait}
    return real(*args)
loop.place_batch = place
with one_line_errors():
    train.main(sys.argv[1:])
"""


def slow_run(run, wait, *flags, before=()):
    """A run whose third step does `wait`, and has come to it."""
    command = [*before, sys.executable, "-c", SLOW_STEP.format(wait=wait), *SMALL, f"--run-dir={run}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "READY" in line:
            return process
    raise AssertionError(process.wait())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_the_second_ends_at_once(number, tmp_path):
    run = tmp_path / "run"

    def start(wait, *flags):
        return slow_run(run, wait, *flags)

    first = start("time.sleep(1)")
    first.send_signal(number)
    said, _ = first.communicate(timeout=100)
    assert first.returncode == 0
    assert f"{number.name}: stopped after step" in said and f"--run-dir {run} --resume" in " ".join(said.split())
    saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert saved and saved[-1] < STEPS, "nothing but whole checkpoints"

    second = start("while True: time.sleep(0.01)", "--resume")
    second.send_signal(number)
    time.sleep(0.2)
    assert second.poll() is None, "the first signal lets the step finish"
    second.send_signal(number)
    second.communicate(timeout=100)
    assert second.returncode == 128 + number
    train.main([*SMALL, f"--run-dir={run}", "--resume"])
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [STEPS, STEPS - 1]


@pytest.fixture
def without_nohup():
    """Programs go on to ignore what is ignored where they are started, SIGHUP under nohup; handlers end there."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("without_nohup")
def test_a_closed_terminal_saves_however_often_it_is_told(tmp_path):
    """The kernel and the shell both tell; SIGTERM may follow, as from a session that ends."""
    process = slow_run(tmp_path / "run", "time.sleep(1)")
    process.send_signal(signal.SIGHUP)
    # Several that wait for a process would reach it in an order of the kernel's. A step may end before it is told.
    assert any("SIGHUP: finishing the step under way" in line for line in process.stdout)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.15)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "SIGHUP: stopped after step" in said
    assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) < STEPS


def test_a_run_under_nohup_does_not_mind_a_closed_terminal(tmp_path):
    process = slow_run(tmp_path / "run", "time.sleep(0.5)", before=["nohup"])
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and f"step:{STEPS}/{STEPS} val_loss" in said


def test_a_signal_is_answered_while_python_cannot_run_its_handler(tmp_path):
    """A compilation takes minutes in one call; C's sleep stands for it."""
    process = slow_run(tmp_path / "run", "import ctypes; ctypes.CDLL(None).sleep(3)")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: finishing the step under way, then saving" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # two at once may be one that two programs pass on
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_run_goes_on_without_its_screen(tmp_path):
    process = slow_run(tmp_path / "run", "time.sleep(0.1)")
    process.stdout.close()  # standard error goes the same way
    assert process.wait(timeout=100) == 0
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [STEPS, STEPS - 1]
    assert f"step:{STEPS}/{STEPS} val_loss" in (tmp_path / "run" / "log.txt").read_text()


def test_a_sweep_stops_where_a_run_was_stopped(tmp_path, monkeypatch):
    """The function saves like the command, and then raises what no `except Exception` takes."""
    config = dataclasses.replace(
        demo(), steps=STEPS, run_dir=str(tmp_path / "run"), val_every=0, devices=1, batch_tokens=128, seq_len=128,
        final_window_tokens=128, data=dataclasses.replace(demo().data, val_tokens=128, val_seq_len=128),
        model=dataclasses.replace(demo().model, dim=16, num_heads=2, layers=LayerSchedule(1, 0, 0, 1)),
    )  # fmt: skip
    real, signals = loop.place_batch, iter([signal.SIGINT])

    def interrupted(*args):
        for number in signals:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "place_batch", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT: the run in .*run was stopped and is saved") as caught:
        loop.train(config, "demo")
    assert caught.value.run_dir == tmp_path / "run"
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert 0 < checkpoints.steps()[0] < STEPS


def test_a_run_in_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def ask():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [before]


def test_signals_are_handled_only_while_training():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
