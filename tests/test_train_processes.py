"""The launcher for several processes of one machine; with real training: test_processes.py."""

import argparse
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from senano_jax.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_processes.py"
spec = importlib.util.spec_from_file_location("train_processes", SCRIPT)
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)

PATIENT = """
import os, signal, sys

# Held back until it is asked for: one that came just before a sleep would be answered after it.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.write(1, f"{sys.argv[1]} {os.environ['JAX_PROCESS_ID']}\\n".encode())
signal.sigwait({signal.SIGTERM})
os.write(1, b"saved\\n")
"""


def python(program):
    return subprocess.Popen([sys.executable, "-S", "-c", program])


@pytest.fixture
def patient():
    process = python("import time; time.sleep(600)")
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("failing", "status", "line"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, "process 1 was ended by SIGKILL; ending the others\n"),
    ],
)
def test_when_one_fails_the_others_end(monkeypatch, capfd, patient, failing, status, line):
    monkeypatch.setattr(launcher, "GRACE_S", 0.0)
    assert launcher.wait_for([patient, python(failing)]) == status
    assert patient.returncode == -signal.SIGKILL
    assert capfd.readouterr().err == line


def test_a_refusal_is_left_to_all():
    assert (
        launcher.wait_for([python("raise SystemExit(2)"), python("import time; time.sleep(0.2); raise SystemExit(2)")])
        == 2
    )
    assert launcher.wait_for([python(""), python("")]) == 0


def test_a_hang_up_that_is_ignored_stays_so(monkeypatch):
    """As under nohup; and those whose handlers are inherited ignore it as well."""
    taken = []
    monkeypatch.setattr(signal, "getsignal", lambda n: signal.SIG_IGN if n == signal.SIGHUP else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.append(number))
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *_, **__: None)
    monkeypatch.setattr(launcher, "wait_for", len)
    assert launcher.main(argparse.Namespace(processes=2, devices_each=1, arguments=["demo"])) == 2
    assert taken == [signal.SIGTERM, signal.SIGINT]


def test_a_signal_reaches_the_process_that_is_being_started(monkeypatch):
    """Each one once: a second one would end it without a save."""
    handlers, told = {}, []

    class Starting:
        def __init__(self, *_, **__):
            self.index, _ = len(told), told.append([])
            if self.index == 1:
                handlers[signal.SIGTERM](signal.SIGTERM, None)

        def send_signal(self, number):
            told[self.index].append(number)

    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(launcher.subprocess, "Popen", Starting)
    monkeypatch.setattr(launcher, "wait_for", len)
    launcher.main(argparse.Namespace(processes=3, devices_each=1, arguments=["demo"]))
    assert told == [[signal.SIGTERM]] * 3


def test_signals_reach_all(tmp_path):
    """Here a process is another program of the same name."""
    (tmp_path / "senano_jax").mkdir()
    (tmp_path / "senano_jax" / "__init__.py").touch()
    (tmp_path / "senano_jax" / "train.py").write_text(PATIENT)
    command = [sys.executable, SCRIPT, "--processes=2", "--", "demo"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert sorted(running.stdout.readline() for _ in range(2)) == ["demo 0\n", "demo 1\n"]
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, "saved\nsaved\n")


def test_each_process_has_devices_of_its_own(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    told = [launcher.environment(index, 2, 2, "127.0.0.1:1") for index in range(2)]
    assert [one["JAX_LOCAL_DEVICE_IDS"] for one in told] == ["0,1", "2,3"]
    assert [one["JAX_PROCESS_ID"] for one in told] == ["0", "1"]
    assert "JAX_NUM_CPU_DEVICES" not in told[0]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launcher.environment(0, 2, 2, "127.0.0.1:1")["JAX_NUM_CPU_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 0}, "--processes is 0; it must be at least 1"),
        ({"devices_each": 0}, "--devices-each is 0"),
        ({"arguments": []}, "nothing to train"),
    ],
)
def test_what_cannot_be_started_is_refused(given, said):
    args = argparse.Namespace(**{"processes": 2, "devices_each": 1, "arguments": ["demo"]} | given)
    with pytest.raises(UserError, match=said):
        launcher.main(args)
