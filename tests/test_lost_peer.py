"""The filter of what JAX prints when it ends a process; with real processes: test_processes.py."""

import subprocess
import sys

import pytest

from senano_jax.training import lost_peer

EARLIER = "E1127 13:18:34.778623   17548 coordination_service.cc:1549] [17] Use error polling to propagate an error\n"
END = (
    "F1127 13:18:34.779476   17559 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. This most likely indicates that another task died. absl::Status: "
)
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
TRACE = "*** Check failure stack trace: ***\n    @     0x7fca42e40634  absl::LogMessage::SendToLog()\n"


def filtered(text, *arguments):
    command = [sys.executable, "-I", "-S", lost_peer.__file__, *arguments]
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "")
    return ended.stderr


@pytest.mark.parametrize(
    "text", ["", "W1127 a warning\n  of two lines\n", f"before\n{EARLIER}after\n", "F1127 no end of it"]
)
def test_other_text_passes(text):
    assert filtered(text) == text


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (f"{SILENT}1\nThe tasks have crashed.\n", "process 1 of this run is gone"),
        (f"{SILENT}2\n13\nThe tasks have crashed.\n", "processes 2 and 13 of this run are gone"),
        (
            "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted\n",
            "process 0 of this run, which connects the others, is gone or out of reach",
        ),
        (
            "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n",
            "not all processes of this run have started in time",
        ),
        (
            "INTERNAL: something new\nmore\n",
            "the processes of this run have lost one another (INTERNAL: something new)",
        ),
    ],
)
def test_the_end_is_one_line(status, line):
    assert filtered(f"before\n{EARLIER}{END}{status}{TRACE}") == f"before\nerror: {line}; start all processes again\n"


def test_the_line_tells_how_to_go_on_with_a_run_that_has_begun(tmp_path):
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    assert filtered(END, str(run_dir)).endswith("; start all processes again\n")
    (run_dir / "config.json").write_text("{}")
    assert filtered(END, str(run_dir)).endswith(
        f"; resume with: python -m senano_jax.train --run-dir '{run_dir}' --resume\n"
    )


PRINTING = f"""
import ctypes, sys
from senano_jax.training.lost_peer import filter_standard_error

def say(text):
    libc.fputs(text.encode(), ctypes.c_void_p.in_dll(libc, "stderr"))

libc = ctypes.CDLL(None)
filter_standard_error(None)
say("from C\\n")
say({END!r})
print("from Python", file=sys.stderr)
"""


def test_only_libraries_pass_through_the_filter():
    ended = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, timeout=60)
    last = "error: the processes of this run have lost one another (); start all processes again"
    assert sorted(ended.stderr.splitlines()) == sorted(["from C", "from Python", last])  # they may overtake each other
