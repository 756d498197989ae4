"""Going on with a run that was stopped: is it the same run, and from which checkpoint?"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from senano_jax.config import Config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.state import TrainState

# What may change between two parts of one run: where and how it is computed, not what.
_FREE = (
    "run_dir",
    "resume",
    "devices",
    "micro_batches",
    "compilation_cache",
    "tensorboard",
    "wandb",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_keep_every",
    "data.train_files",
    "data.val_files",
    "model.attention",
    "model.remat",
    "model.unroll",
)


def check_same_run(config: Config, run_dir: Path) -> None:
    """Raises UserError naming the fields in which `config` differs from the run in `run_dir`."""
    saved, given = (_flat(dataclasses.asdict(c)) for c in (read_config(run_dir / "config.json")[0], config))
    different = [f"{name} {saved[name]} -> {given.get(name)}" for name in saved if saved[name] != given.get(name)]
    different = [text for text in different if text.split()[0] not in _FREE]
    if different:
        raise UserError(
            f"--resume: the run in {run_dir} has another configuration ({', '.join(different)}); "
            "drop these flags, or start a new run"
        )


def restore(
    checkpoints: Checkpoints, wanted: int | str, abstract: TrainState, mesh: Mesh, say: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """State and record of checkpoint `wanted`, or for "latest" of the newest one that is whole.

    Returns None for "latest" if the run was stopped before its first checkpoint. Raises UserError if the step asked
    for is not there, or if all checkpoints are damaged.
    """
    steps = checkpoints.steps()
    if wanted != "latest":
        if wanted not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise UserError(f"--resume {wanted}: there is no checkpoint of this step; there are: {there}")
        return checkpoints.restore(int(wanted), abstract, mesh)
    for older, step in enumerate(steps, start=1):
        try:
            return checkpoints.restore(step, abstract, mesh)
        except UserError as error:
            if older == len(steps):
                raise
            say(f"{error}; going back to that of step {steps[older]}")
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
