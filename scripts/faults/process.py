"""One tiny training run: the processes it takes, and what is planned to happen to each."""

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import grain  # noqa: F401  # imported once here rather than in every process

from senano_jax import train
from senano_jax.errors import one_line_errors

TRAINING = "run folder"  # in the line that a run prints when it is about to train
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}
FAULTS = (*SIGNALS, "closed", "full")  # the last two are those of standard output
COUNTED = {"kill": "kills", "term": "terms", "hup": "hups", "closed": "closed", "full": "full"}  # names of the counts


@dataclass
class Run:
    """One training run and the processes it took."""

    folder: Path
    flags: list[str]
    planned: str | None = None  # what the present process will suffer, one of FAULTS, or nothing
    delay: float = 0.0
    counted_from: str = "start"  # where the delay begins: "start", "training" or the first "save" of the process
    pid: int = 0
    starts: int = 0
    since: dict[str, float] = field(default_factory=dict)  # when the process came to each of these points
    saved_before: list[int] = field(default_factory=list)
    pipe: int | None = None  # to read from, if standard output will be closed
    printed: bytes = b""  # into it
    suffered: bool = False
    finished: bool = False
    violations: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder.with_suffix(f".{self.starts}.txt")

    def start(self) -> None:
        resume = (self.folder / "config.json").exists()  # before it is written there is nothing to resume
        self.starts, self.since, self.suffered = self.starts + 1, {"start": time.monotonic()}, False
        self.saved_before = self.checkpoints()
        flags = [*self.flags, f"--run-dir={self.folder}", *(["--resume"] if resume else [])]
        writing, self.printed = None, b""
        if self.planned == "closed":
            self.pipe, writing = os.pipe()
            os.set_blocking(self.pipe, False)
        elif self.planned == "full":
            writing, self.suffered = os.open("/dev/full", os.O_WRONLY), True
        self.pid = os.fork()
        if self.pid == 0:
            if self.pipe is not None:
                os.close(self.pipe)
            _be_a_training_process(flags, self.output, writing)
        if writing is not None:
            os.close(writing)

    def suffer(self) -> None:
        """Lets happen what is planned."""
        if self.planned in SIGNALS:
            os.kill(self.pid, SIGNALS[self.planned])
        else:
            self.close_pipe()
        self.suffered = True

    def close_pipe(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def look(self) -> None:
        """Notes which points the process has come to."""
        now = time.monotonic()
        if self.pipe is not None:
            with contextlib.suppress(BlockingIOError):
                self.printed += os.read(self.pipe, 1 << 16)
        if "training" not in self.since:
            if TRAINING in self.text():
                self.since["training"] = now
        elif "save" not in self.since and (self.in_a_save() or self.checkpoints() != self.saved_before):
            self.since["save"] = now

    def text(self) -> str:
        written = self.output.read_bytes() if self.output.exists() else b""
        return (self.printed + written).decode(errors="replace")

    def in_a_save(self) -> bool:
        return any((self.folder / "checkpoints").glob("*orbax-checkpoint-tmp*"))

    def checkpoints(self) -> list[int]:
        return [int(p.name) for p in (self.folder / "checkpoints").glob("*") if p.name.isdigit()]


def _be_a_training_process(flags: list[str], output: Path, standard_output: int | None) -> None:
    """Prints into `output`; into `standard_output` what belongs there, if it is given."""
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup has set for this script
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file if standard_output is None else standard_output, 1)
        os.dup2(file, 2)
        with one_line_errors(prints_result=False):
            train.main(flags)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
