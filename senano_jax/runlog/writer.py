"""The run folder: what a run was told, where it ran, and what it measured, line by line."""

import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from pathlib import Path

import jax

from senano_jax.config import Config
from senano_jax.config_file import write_config
from senano_jax.errors import UserError
from senano_jax.files import write_atomically

_PACKAGES = ("senano-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def new_run_dir(preset: str) -> Path:
    """logs/<preset>-<date>-<time>-<four letters>."""
    return Path("logs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunFolder:
    """config.json and environment.json, written once; metrics.jsonl and log.txt, appended line by line and closed
    when the context is left.

    In a job of several processes only process 0 writes. Raises UserError if the folder holds a run already or
    cannot be written.
    """

    def __init__(self, path: Path, config: Config, preset: str, parameters: int):
        self.path = path
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        if (path / "metrics.jsonl").exists():
            raise UserError(f"--run-dir {path} holds a run already; choose another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_config(path / "config.json", config, preset, parameters)
            write_atomically(path / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
            self._metrics = (path / "metrics.jsonl").open("a", buffering=1)
            self._log = (path / "log.txt").open("a", buffering=1)
        except OSError as error:
            raise UserError(f"--run-dir {path} cannot be written ({error.strerror or error})") from None

    def metric(self, **record: float) -> None:
        if self._writes:
            self._metrics.write(json.dumps(record) + "\n")

    def log(self, line: str) -> None:
        if self._writes:
            self._log.write(line + "\n")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._metrics.close()
            self._log.close()


def environment() -> dict:
    """Packages, devices, commit and flags of this process."""
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "devices": [{"kind": device.device_kind, "platform": device.platform} for device in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
