"""Checkpoints of a run: written in the background with orbax, complete or absent."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from senano_jax.errors import UserError
from senano_jax.training.mesh import replicated
from senano_jax.training.state import Params, TrainState

KEEP = 2  # newest checkpoints kept


class Checkpoints:
    """The checkpoints in `folder`, one a step. A context manager: on leaving it everything is on disk."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file it touches
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(KEEP))
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._folder = folder

    def latest_step(self) -> int | None:
        """The newest step that is completely on disk; waits for a save under way."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Starts to save; `position` is the JSON state of the data stream. Returns once the arrays are copied."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            position=ocp.args.JsonSave(position),
        )
        self._manager.save(step, args=items, force=True)

    def restore_params(self, step: int, abstract: Params, mesh: Mesh) -> Params:
        """The weights of a step, on all devices of the mesh. Raises UserError if they cannot be read."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), abstract)
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"checkpoint {step} in {self._folder} cannot be read: {reason}") from None
        return items["params"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def load_latest_params(run_dir: Path, abstract: Params, mesh: Mesh) -> tuple[Params, int]:
    """Weights and step of a run's newest checkpoint. Raises UserError if there is none or it does not fit."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir} holds no checkpoints; give the folder of a run that saved one")
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{folder} holds no finished checkpoint; give the folder of a run that saved one")
        return checkpoints.restore_params(step, abstract, mesh), step
