"""Our own folders of checkpoints."""

import random
import shutil
from pathlib import Path

import jax
import numpy as np

from fuzz.damage import damaged, deep
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import make_mesh
from senano_jax.training.state import TrainState


class CheckpointFolders:
    """A valid read is one whose state and record equal the original's bit by bit."""

    def __init__(self, seeds: Path):
        self._seed = seeds / "checkpoints"
        weights = {"a": np.ones((4, 8), np.float32), "b": np.ones(3, np.float32)}
        self._state = jax.device_put(TrainState(np.int32(1), weights, {"m": np.ones(5, np.float32)}))
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._state)
        with Checkpoints(self._seed) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, self._state, {"step": step, "next_token": 7, "evaluated": True}, 3.0 + step)

    def __call__(self, rng: random.Random, place: Path) -> str:
        folder = place / "checkpoints"
        shutil.copytree(self._seed, folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        path = rng.choice(files)
        how = rng.choice(["bytes", "bytes", "bytes", "gone", "link", "deep", "folder gone", "folder named"])
        if how == "bytes":
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif how == "deep":
            path.write_bytes(deep(rng))
        elif how == "folder gone":
            shutil.rmtree(path.parent)
        elif how == "folder named":
            (folder / rng.choice(["99", "-1", "1e3", "007", "9" * 30, "8.orbax-checkpoint-tmp", "x"])).mkdir()
        else:
            path.unlink()
            if how == "link":
                path.symlink_to(rng.choice(["/dev/null", "/etc/passwd", path.name, "../..", "/"]))
        with Checkpoints(folder, read_only=rng.random() < 0.5) as checkpoints:
            steps = checkpoints.steps()
            for step in steps:
                restored, record = checkpoints.restore(step, self._abstract, make_mesh(1))
                same = jax.tree.map(
                    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored, self._state
                )
                if not all(jax.tree.leaves(same)) or record["step"] != step or record["next_token"] != 7:
                    raise AssertionError("damage was not noticed")
        return how
