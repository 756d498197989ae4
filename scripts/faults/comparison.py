"""A finished run beside one that nothing disturbed."""

import json
from pathlib import Path

import jax
import numpy as np

from senano_jax.config_file import read_config
from senano_jax.model.build import make_model
from senano_jax.optim.recipe import make_optimizer
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import DATA_AXIS, make_mesh
from senano_jax.training.state import TrainState, abstract_state

TIMES = ("step_ms", "tokens_per_s", "train_time_ms")


def compare(reference: Path, run: Path) -> list[str]:
    """What distinguishes a finished run from the undisturbed one."""
    faults = []
    expected, found = records(reference), records(run)
    if found != expected:
        step = next((a for a, b in zip(expected, found) if a != b), f"{len(found)} records of {len(expected)}")
        faults.append(f"metrics.jsonl differs: {step}")
    lines = [len((folder / "log.txt").read_text().splitlines()) for folder in (reference, run)]
    if lines[0] != lines[1]:
        faults.append(f"log.txt has {lines[1]} lines, not {lines[0]}")
    positions = [r["tokens_read"] for r in found if "loss" in r]
    if any(b - a != positions[0] for a, b in zip([0, *positions], positions)):
        faults.append(f"positions are not contiguous: {positions}")
    wanted, state = ([np.asarray(leaf) for leaf in jax.tree.leaves(state_of(folder))] for folder in (reference, run))
    if len(wanted) != len(state):
        faults.append("the final state has another structure")
    different = sum(a.tobytes() != b.tobytes() for a, b in zip(wanted, state))
    if different:
        faults.append(f"{different} of {len(wanted)} arrays of the final state differ")
    return faults


def records(run: Path) -> list[dict]:
    """Those of metrics.jsonl, without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def abstract_of(run: Path) -> TrainState:
    """The shapes and types of a run's state."""
    config, _ = read_config(run / "config.json")
    return abstract_state(
        make_model(config.model, config.dtype), make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    )


def state_of(run: Path, step: int | None = None, devices: int = 1) -> TrainState:
    """The checkpoint of a step, by default the last of the run's plan."""
    step = read_config(run / "config.json")[0].steps if step is None else step
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(step, abstract_of(run), make_mesh(devices))[0]
