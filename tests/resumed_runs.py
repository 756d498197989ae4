"""Small runs that are stopped and resumed, for tests of checkpoints: how to make one, and what must be the same."""

import shutil

import jax
import numpy as np
import pytest
from event_files import shown_scalars
from faults.comparison import TIMES, records, state_of

from senano_jax import train
from senano_jax.config_file import read_config
from senano_jax.model.build import make_model
from senano_jax.optim.recipe import make_optimizer
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import DATA_AXIS, make_mesh
from senano_jax.training.state import init_state

STEPS, BATCH = 6, 128
SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    f"--steps={STEPS}", f"--batch-tokens={BATCH}", "--seq-len=128", "--final-window-tokens=128",
    "--data.val-tokens=128", "--data.val-seq-len=128", "--val-every=3", "--devices=1", "--checkpoint-every=2",
    "--checkpoint-keep=9", "--tensorboard",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to, with checkpoints of steps 2, 4 and 6."""
    return train.main([*SMALL, f"--run-dir={tmp_path_factory.mktemp('runs') / 'run'}"])


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "run")


def resume(run_dir, *flags):
    return train.main([*SMALL, f"--run-dir={run_dir}", *(flags or ["--resume"])])


def steps_of(run_dir):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_run(run_dir, undisturbed):
    assert records(run_dir) == records(undisturbed)
    assert len((run_dir / "log.txt").read_text().splitlines()) == len(
        (undisturbed / "log.txt").read_text().splitlines()
    )
    assert_same_bits(state_of(run_dir), state_of(undisturbed))
    assert curves(run_dir) == curves(undisturbed)


def curves(run_dir):
    """What TensorBoard shows, each point once."""
    scalars = [p for axis in ("steps", "tokens") for p in shown_scalars(run_dir / "tensorboard" / axis)]
    return [point for point in scalars if point[0] not in TIMES]


def losses(run_dir):
    return {r["step"]: r["loss"] for r in records(run_dir) if "loss" in r}


def init_state_of(run_dir):
    config, _ = read_config(run_dir / "config.json")
    optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    return init_state(make_model(config.model, config.dtype), optimizer, 0, make_mesh(1)), {"step": 1}
