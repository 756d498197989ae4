"""One line in place of the stack trace with which JAX ends a process of several when another one is gone.

JAX notices it by itself, also while the Python of this process waits for a collective, and ends it from a thread of
C++, where no Python can run: a report of twenty lines, and abort(). What C and C++ libraries print passes through a
filter, this file as a program of its own, which outlives the process; all but that report it lets through at once.
"""

import contextlib
import ctypes
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

# Of the report, which JAX 0.10 to 0.12 word alike. A text that they no longer have passes through the filter.
_END = b"JAX distributed service detected fatal errors"
_REPORT = re.compile(rb"^(?:E\d{4} .*\bcoordination_service|F\d{4} .*" + _END + rb")", re.MULTILINE)
_SILENT = re.compile(r"stopped sending heartbeats\):\n((?:.*\d\n)+)")
_HELD_S = 2.0  # an error of the coordination service is held back, for the end that follows within milliseconds


def filter_standard_error(run_dir: str | None) -> None:
    """Starts the filter for what the C and C++ libraries of this process print from now on; Python's own output does
    not pass through it. `run_dir` is the run's folder, for the command that resumes it. On Linux alone."""
    if sys.platform != "linux":
        return
    reading, writing = os.pipe()
    command = [sys.executable, "-I", "-S", __file__, *([] if run_dir is None else [run_dir])]
    subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL)
    os.close(reading)
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fdopen(writing, b"w"))
    libc.setbuf(stream, None)  # as standard error is: nothing printed is lost when the process ends
    ctypes.c_void_p.in_dll(libc, "stderr").value = stream.value


def explanation(report: str, run_dir: str | None) -> str:
    """The line that says what JAX's report says, and what to do."""
    if "RegisterTask" in report:
        what = "not all processes of this run have started in time"
    elif silent := _SILENT.search(report):
        numbers = re.findall(r"\d+$", silent[1], re.MULTILINE)
        noun, verb = ("processes", "are") if numbers[1:] else ("process", "is")
        what = f"{noun} {' and '.join(numbers)} of this run {verb} gone"
    elif "Failed to send RPC to coordination service" in report:
        what = "process 0 of this run, which connects the others, is gone or out of reach"
    else:
        status = report.partition("absl::Status: ")[2].partition("\n")[0]
        what = f"the processes of this run have lost one another ({status[:150]})"
    if run_dir is None or not (Path(run_dir).expanduser() / "config.json").exists():
        return f"error: {what}; start all processes again"
    return f"error: {what}; resume with: python -m senano_jax.train --run-dir {shlex.quote(run_dir)} --resume"


def _filter(run_dir: str | None) -> None:
    """Copies standard input to standard error until its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the process decides what they mean
        signal.signal(number, signal.SIG_IGN)
    held = b""
    while True:
        in_time = select.select([0], [], [], _HELD_S if held else None)[0]
        read = os.read(0, 1 << 16) if in_time else b""
        text = held + read
        report = _REPORT.search(text) if read else None
        _write(text[: report.start()] if report else text)
        held = text[report.start() :] if report else b""
        if _END in held:
            line = explanation(held.decode(errors="replace"), run_dir)
            _write(("\r\x1b[2K" * os.isatty(2) + line + "\n").encode())  # on a terminal in place of the live line
            while os.read(0, 1 << 16):
                pass
            return
        if in_time and not read:
            return


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        while text:
            text = text[os.write(2, text) :]


if __name__ == "__main__":
    _filter(*(sys.argv[1:] or [None]))
