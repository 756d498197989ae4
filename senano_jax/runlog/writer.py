"""The run folder: what a run was told, where it ran, and what it measured, line by line."""

import contextlib
import fcntl
import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from senano_jax.config import Config
from senano_jax.config_file import write_config
from senano_jax.errors import UserError
from senano_jax.files import write_atomically
from senano_jax.preset_file import names_file, without_folder
from senano_jax.versions import installed_version

_PACKAGES = ("senano-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FILES = {"metrics": "metrics.jsonl", "log": "log.txt"}  # that grow


def new_run_dir(preset: str) -> Path:
    """logs/<preset>-<date>-<time>-<four letters>; of a preset FILE.py:NAME, the name. What a path or a shell could take
    for something else, in a name that a file tells, is a dash."""
    name = re.sub(r"[^\w.+-]", "-", preset.rpartition(":")[2] if names_file(preset) else preset)
    return Path("logs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunFolder:
    """config.json, written once; environment.json, by each part of the run; metrics.jsonl and log.txt, line by line.

    A context manager that holds the folder's lock: a second run cannot use it, and a dead one does not keep it.
    Call `start` or `go_on` before writing: on leaving a folder in which no run was started, what was made for it goes
    again. In a job of several processes only process 0 writes.
    Raises UserError if the folder is in use or cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._writes = jax.process_index() == 0
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> "RunFolder":
        if self._writes:
            with self._one_line_errors():
                self._new = [path for path in (self.path, *self.path.parents) if not path.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = (self.path / ".lock").open("w")
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"--run-dir {self.path} is in use by another process; choose another") from None
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            with self._one_line_errors(), contextlib.ExitStack() as stack:
                for file in (self._lock, *self._files.values()):
                    stack.callback(file.close)
                if not (self.path / "config.json").exists():
                    self._leave_nothing()

    def refuse_if_started(self) -> None:
        """Raises UserError if the folder holds a run already."""
        if self._writes and (self.path / "config.json").exists():
            raise UserError(f"--run-dir {self.path} holds a run already; choose another folder, or add --resume")

    def start(self, config: Config, preset: str, parameters: int) -> None:
        """Begins a new run. Of a preset in a file the folder keeps no path: it may be published."""
        if not self._writes:
            return
        with self._one_line_errors():
            write_config(self.path / "config.json", config, without_folder(preset), parameters)
            self._write_environment([])
            self._open(metrics=0, log=0)

    def require(self, position: dict[str, int]) -> None:
        """Raises UserError if a file is shorter than it was at `position`, as `position()` gave it."""
        for name, size in position.items() if self._writes else ():
            path = self.path / _FILES[name]
            if size > (path.stat().st_size if path.exists() else 0):
                raise UserError(f"{path} is shorter than when the checkpoint was saved; restore it")

    def go_on(self, position: dict[str, int]) -> None:
        """Continues a run at `position`: what was written later is cut off. Raises UserError as `require`."""
        if not self._writes:
            return
        self.require(position)
        with self._one_line_errors():
            self._write_environment(self._environments())
            self._open(**position)

    def position(self) -> dict[str, int]:
        """How far metrics.jsonl and log.txt are written, in bytes, all of them on disk."""
        with self._one_line_errors():
            for file in self._files.values():
                os.fsync(file.fileno())  # a checkpoint must not outlive the lines it counts on
            return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def metric(self, **record: float) -> None:
        """Appends a line to metrics.jsonl."""
        self._write("metrics", json.dumps(record))

    def log(self, line: str) -> None:
        """Appends a line to log.txt."""
        self._write("log", line)

    def _leave_nothing(self) -> None:
        """Removes the lock, and the folders that are empty and were made for this run."""
        (self.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's file is in it
            for folder in (self.path / "checkpoints", *self._new):
                if folder.exists():
                    folder.rmdir()

    def _open(self, metrics: int, log: int) -> None:
        for name, size in (("metrics", metrics), ("log", log)):
            self._files[name] = (self.path / _FILES[name]).open("a", buffering=1, encoding="utf-8")
            self._files[name].truncate(size)

    def _write(self, name: str, line: str) -> None:
        if self._writes:
            with self._one_line_errors():
                self._files[name].write(line + "\n")

    def _environments(self) -> list[dict]:
        """Those of the parts of this run so far, oldest first; none if they cannot be read."""
        try:
            last = json.loads((self.path / "environment.json").read_bytes())
            return [*last.pop("earlier", []), last]
        except (OSError, ValueError, RecursionError, AttributeError, TypeError):
            return []

    def _write_environment(self, earlier: list[dict]) -> None:
        document = environment() | ({"earlier": earlier} if earlier else {})
        write_atomically(self.path / "environment.json", (json.dumps(document, indent=2) + "\n").encode())

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path} cannot be written ({error.strerror or error}); make room or choose another"
            ) from None


def environment() -> dict:
    """Packages, devices, commit and flags of this process."""
    return {
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "devices": [{"kind": device.device_kind, "platform": device.platform} for device in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _program() -> list[str]:
    """What Python was told to run: a module of this package, or a script."""
    program = Path(sys.argv[0])
    is_module = program.resolve().parent == Path(__file__).resolve().parents[1]
    return ["-m", f"senano_jax.{program.stem}"] if is_module else [str(program)]


def _git_commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" for a modified one."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
