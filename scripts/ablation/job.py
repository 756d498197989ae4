"""The process of one run. It imports everything first, so that a device waits only for what needs one.

    python scripts/ablation/job.py PARENT

Reads one line of JSON from standard input: `config` (a file as the run folder's config.json), `output` (a file to
append to), `platform` and `environment` (what JAX is to run on, and variables that say which device) and `command`
(that of the queue, for the run's records). Without a line it does nothing. When the process PARENT dies, it is told to
stop as by a closed terminal: it saves, and leaves the device.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import grain  # noqa: F401  # by the data stream, later
import jax

from senano_jax.config_file import read_config
from senano_jax.errors import one_line_errors
from senano_jax.training.loop import train
from senano_jax.training.stop import Stopped

_PR_SET_PDEATHSIG = 1


def main(parent: int) -> None:
    _stop_with(parent)
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ.update(order["environment"])
    jax.config.update("jax_platforms", order["platform"])
    sys.argv = order["command"]
    config, preset = read_config(Path(order["config"]))
    with contextlib.suppress(Stopped):  # it has saved; the queue sees that it is not finished
        train(config, preset, keeps_steps=True)


def _stop_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(128 + signal.SIGHUP)


if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main(int(sys.argv[1]))
