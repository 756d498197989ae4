"""Runs the jobs of a study, one on each device at a time, so that another `run` can go on wherever this one ends."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ablation.cost import training_flops
from ablation.runs import failure, failure_file, finished_run, has_begun, step_records
from ablation.study import Job, Study
from senano_jax.config_file import to_document
from senano_jax.errors import UserError
from senano_jax.files import write_atomically

CHECKPOINTS = 8  # saved along a run whose study does not say how often
POLL_S, STATUS_S = 0.1, 30
ATTEMPTS = 2  # of a job that something kills
ABOUT_EQUAL = 1.25  # ratio of lengths that do not matter
_SHARED_MEMORY = 0.92  # of a GPU's, for all jobs on it; the rest is for their contexts
_PROGRAM = Path(__file__).with_name("job.py")


@dataclass(frozen=True)
class Device:
    """A place for one job at a time."""

    name: str
    platform: str
    """JAX's name of it: a GPU that fails must not become a slow CPU."""
    environment: dict[str, str]


@dataclass
class Running:
    job: Job
    device: Device
    process: subprocess.Popen
    begun: float
    written: int  # bytes of its output file that are of earlier attempts


def devices(count: int | None, per_gpu: int = 1) -> list[Device]:
    """The first `count` GPUs that this process may use, or all, each of them `per_gpu` times with an equal share of its
    memory, in turns; where there is none, `count` (1) shares of the CPU.

    Initialises no GPU. Raises UserError if there are fewer, and for shares of GPUs where there is none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = _gpus() if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    if not names or os.environ.get("JAX_PLATFORMS") == "cpu":
        if per_gpu > 1:
            raise UserError(f"--per-gpu {per_gpu}: there is no GPU here; --gpus takes a number of processes on the CPU")
        return [Device(f"CPU {k}", "cpu", {}) for k in range(1 if count is None else count)]
    if count is not None and count > len(names):
        raise UserError(f"--gpus {count}: this machine has {len(names)} GPUs")
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if visible is None else {}  # nvidia-smi's
    found = [Device(f"GPU {name}", "cuda,cpu", {"CUDA_VISIBLE_DEVICES": name, **order}) for name in names[:count]]
    if per_gpu == 1:
        return found
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_SHARED_MEMORY / per_gpu:.3f}"}
    return [
        Device(f"{gpu.name} ({n} of {per_gpu})", gpu.platform, gpu.environment | share)
        for n in range(1, per_gpu + 1)
        for gpu in found
    ]


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.split() if found.returncode == 0 else []


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Makes the folder of a study and keeps other queues out of it. Raises UserError if one is there, or if it cannot
    be made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error.strerror or error}); choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{root} is in use by another queue; wait for its end, or choose another --out") from None
        yield


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[str]]:
    """The names of the signals that ask to stop, as they come; another SIGTERM or SIGINT ends the process at once.

    SIGHUP does nothing where it was ignored before (nohup). Jobs do hear of it, from their first moment on: a program
    that is started goes on to ignore what is ignored, and knows nothing of handlers.
    """
    received: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number != signal.SIGHUP:
            os._exit(128 + number)
        received.append(signal.Signals(number).name)

    def nothing(number: int, frame: FrameType | None) -> None: ...

    asking = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in asking}
    if signal.SIGHUP not in asking:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, nothing)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_earlier_jobs(root: Path, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """Returns when no process has the folder of one of `jobs` open: those of a queue that was killed save and end, and
    until then they have their device too. The caller holds the lock of `root` and has started none itself."""
    for job in jobs:
        if _in_use(root / job.name):
            say(f"{job.name} still runs for an earlier queue: waiting for its end")
            while _in_use(root / job.name):
                time.sleep(POLL_S)


class Queue:
    """What is left of `jobs`, the longest first, on `places`. `seconds` is the time it may take, or None.

    The caller holds the lock of `root`, the study's folder. Raises UserError, before anything starts, for a folder of
    another configuration.
    """

    def __init__(
        self,
        study: Study,
        root: Path,
        jobs: Sequence[Job],
        places: Sequence[Device],
        seconds: float | None,
        say: Callable[[str], None],
    ):
        self._study, self._root, self._say = study, root, say
        self._free, self._running = list(places), []
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._spare: subprocess.Popen | None = None  # has imported everything and waits for a job
        self._starts: Counter[str] = Counter()
        self.done = [job for job in jobs if finished_run(root, job)]
        self.failed = [job for job in jobs if job not in self.done and failure(root, job) is not None]
        self._left = [job for job in jobs if job not in self.done and job not in self.failed]
        self._left.sort(key=self._urgency)
        self.interrupted: list[Job] = []
        for job in self.done:
            self._tidy(job)

    @property
    def unfinished(self) -> int:
        return len(self._left) + len(self.interrupted) + len(self._running)

    def run(self) -> str | None:
        """Returns when nothing runs any more: why it stopped before the end, or None."""
        reason, spoken = None, time.monotonic()
        with _noting_signals() as received:
            try:
                while True:
                    if reason is None and (reason := self._reason_to_stop(received)):
                        self._say(f"{reason}: the running jobs save and end")
                        self._stop_jobs()
                    while reason is None and self._free and self._left:
                        self._start(self._left.pop(0), self._free.pop(0))
                    if not self._running:
                        return reason if self._left or self.interrupted else None
                    time.sleep(POLL_S)
                    for running in [r for r in self._running if r.process.poll() is not None]:
                        self._ended(running, reason is not None)
                    if time.monotonic() - spoken >= STATUS_S:
                        spoken = time.monotonic()
                        self._say(self._status())
            finally:
                self._stop_jobs()
                if self._spare is not None:
                    self._spare.kill()

    def _reason_to_stop(self, received: list[str]) -> str | None:
        if received:
            return received[0]
        return "time limit" if self._deadline is not None and time.monotonic() >= self._deadline else None

    def _stop_jobs(self) -> None:
        """By SIGHUP, which a run takes for one request however often it comes: a machine that is shut down may send
        SIGTERM to all processes, and a second one of those would keep the jobs from saving."""
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGHUP)

    def _start(self, job: Job, device: Device) -> None:
        folder = self._root / job.name
        resumed = has_begun(self._root, job)
        config = dataclasses.replace(
            job.config,
            devices=1,
            run_dir=str(folder),
            resume="latest" if resumed else None,
            checkpoint_every=job.config.checkpoint_every or max(1, job.config.steps // CHECKPOINTS),
        )
        file = self._root / f"{job.name}.json"
        document = {"preset": job.preset, **to_document(config)}
        write_atomically(file, (json.dumps(document, indent=2) + "\n").encode())
        output = self._output(job)
        written = output.stat().st_size if output.exists() else 0
        order = {
            "config": str(file),
            "output": str(output),
            "platform": device.platform,
            "environment": device.environment,
            "command": sys.argv,
        }
        process, self._spare = self._spare or _waiting_process(), None
        with contextlib.suppress(BrokenPipeError):  # it could not even start; its exit status tells
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.close()
        if self._left:
            self._spare = _waiting_process()
        self._starts[job.name] += 1
        self._running.append(Running(job, device, process, time.monotonic(), written))
        self._say(f"{job.name}: {'goes on' if resumed else 'started'} on {device.name}")

    def _ended(self, running: Running, stopping: bool) -> None:
        self._running.remove(running)
        self._free.append(running.device)
        job, status, minutes = running.job, running.process.returncode, (time.monotonic() - running.begun) / 60
        killed = -status if status < 0 else status - 128 if 128 < status <= 128 + signal.SIGRTMAX else 0
        run = finished_run(self._root, job)
        if run is not None:
            self.done.append(job)
            self._tidy(job)
            self._say(f"{job.name}: finished, loss {run.final.val_loss:.4f}, {minutes:.1f} minutes")
        elif killed and not stopping and self._starts[job.name] < ATTEMPTS:
            self._left.insert(0, job)
            self._say(f"{job.name}: killed by signal {killed}, to be started again")
        elif killed or status == 0:
            self.interrupted.append(job)
            self._say(f"{job.name}: stopped after {minutes:.1f} minutes, to go on with another run")
        else:
            reason = _last_line(self._output(job), running.written) or f"ended with status {status}"
            write_atomically(failure_file(self._root, job), f"{reason}\n".encode())
            self.failed.append(job)
            self._say(f"{job.name}: failed: {reason} (see {self._output(job)})")

    def _tidy(self, job: Job) -> None:
        if not self._study.keep_weights:
            shutil.rmtree(self._root / job.name / "checkpoints", ignore_errors=True)

    def _output(self, job: Job) -> Path:
        return self._root / f"{job.name}.txt"

    def _urgency(self, job: Job) -> tuple[int, int]:
        """The longest come first. Among those of about one length the first seed of each variant does: the next ones
        find its program compiled."""
        records = step_records(self._root / job.name)
        steps_left = job.config.steps - (records[-1]["step"] if records else 0)
        work = training_flops(job.config) * max(1, steps_left) / job.config.steps
        return -round(math.log(work, ABOUT_EQUAL)), self._study.seeds.index(job.seed)

    def _status(self) -> str:
        counts = f"{len(self._running)} running, {len(self.done)} done, {len(self._left)} left"
        counts += f", {len(self.failed)} failed" if self.failed else ""
        return f"{counts}: " + "; ".join(progress(self._root, running.job) for running in self._running)


def progress(root: Path, job: Job) -> str:
    """How far a job is and how fast, such as "base-seed0 120/200 268k/s"."""
    records = step_records(root / job.name)
    if not records:
        return f"{job.name} starting"
    speed = records[-1].get("tokens_per_s", 0)
    return f"{job.name} {records[-1]['step']}/{job.config.steps} {speed / 1000:,.1f}k tokens/s"


def _waiting_process() -> subprocess.Popen:
    """Its own session: the terminal's Ctrl-C is for the queue, which tells the jobs to stop, once."""
    command = [sys.executable, str(_PROGRAM), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _in_use(folder: Path) -> bool:
    """Whether a process has the run in this folder open. To ask takes its lock for a moment."""
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _last_line(output: Path, start: int) -> str:
    """That which tells why a job ended, behind byte `start`; what JAX adds below its tracebacks does not."""
    try:
        lines = output.read_bytes()[start:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    telling = (line.strip() for line in reversed(lines) if line.strip("- ") and "JAX_TRACEBACK_FILTERING" not in line)
    return next(telling, "")[:300]
