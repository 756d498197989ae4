"""Checkpoints of a run: written in the background with orbax, each whole or absent, and checked when read."""

import contextlib
import itertools
import json
import logging
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import plainly_named, write_atomically
from senano_jax.model.build import Params, abstract_params, make_model
from senano_jax.training.mesh import replicated
from senano_jax.training.orbax_leftovers import ignore_leftovers
from senano_jax.training.processes import of_first_process, together
from senano_jax.training.state import TrainState, state_shardings

_READOUT_CHECKSUMS = "readout_checksums"  # in the record of a checkpoint that holds weights read out
_LOSS = "metrics/metrics"  # where orbax keeps the validation loss of a checkpoint


class Checkpoints:
    """The checkpoints in `folder`, one a step: the newest `keep_latest`, the best by validation loss, and every
    `keep_every` steps (0: none). A context manager: on leaving it everything is on disk. With `read_only` nothing in
    the folder is touched, so that a run may go on saving there. In a job of several processes each calls every method.

    Raises UserError if the folder cannot be used.
    """

    def __init__(self, folder: Path, keep_latest: int = 2, keep_every: int = 0, *, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every file; its errors are raised
        policies = [
            preservation.LatestN(n=keep_latest),
            # Policies keep the end of the sorted list: the smallest loss, sorted downwards.
            preservation.BestN(
                get_metric_fn=lambda m: m["val_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        if keep_every:
            policies.append(preservation.EveryNSteps(interval_steps=keep_every))
        self._folder, self._read_only = folder, read_only
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} cannot be used for checkpoints (it is not a folder); move it away")
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                best_fn=lambda metrics: metrics["val_loss"],
                best_mode="min",
            )
            with together(), _one_line_errors(folder):
                if jax.process_index() == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    _drop_damaged_losses(folder)
        self._stack = contextlib.ExitStack()
        with _one_line_errors(folder):
            self._orbax_folder = self._stack.enter_context(plainly_named(folder))
            self._manager = ocp.CheckpointManager(self._orbax_folder, options=options)
        # Reads without waiting for the other processes: one that cannot read must still be able to say so.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)

    def save(
        self,
        step: int,
        state: TrainState,
        record: dict[str, Any],
        val_loss: float | None = None,
        readout: Params | None = None,
    ) -> None:
        """Starts to save, and returns once the arrays are copied; an earlier save is waited for first.

        `record` is JSON: what else the run needs to go on. `readout` holds the weights to use in place of the state's,
        if there are others; `val_loss` is the validation loss of the weights to use.
        """
        record = {**record, "checksums": jax.device_get(_checksums(state)).tolist()}
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        }
        if readout is not None:
            record[_READOUT_CHECKSUMS] = jax.device_get(_checksums(readout)).tolist()
            items["readout"] = ocp.args.StandardSave(readout)
        record["crc32"] = _crc32(record)
        self._guarded(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(record=ocp.args.JsonSave(record), **items),
                metrics=None if val_loss is None else {"val_loss": val_loss},
                force=True,
            )
        )

    def steps(self) -> list[int]:
        """Steps whose checkpoints are completely on disk, newest first; waits for a save under way."""
        self._guarded(self._manager.wait_until_finished)
        return of_first_process(sorted(self._manager.all_steps(), reverse=True))

    def restore(self, step: int, abstract: TrainState, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
        """The state, on all devices of the mesh, and the record saved with it.

        `abstract` is the state's tree of shapes and dtypes. Raises UserError if anything is missing or damaged.
        """
        placed = _placed(abstract, state_shardings(abstract, mesh))
        items = self._read(
            step,
            params=ocp.args.StandardRestore(placed.params),
            optimizer=ocp.args.StandardRestore({"step": placed.step, "opt_state": placed.opt_state}),
            record=ocp.args.JsonRestore(),
        )
        optimizer = items["optimizer"]
        state = TrainState(optimizer["step"], items["params"], optimizer["opt_state"])
        return state, self._checked(step, items["record"], state)

    def restore_params(self, step: int, abstract: Params, mesh: Mesh) -> Params:
        """The weights to use, alone: those read out, if there are any, else those of the state. Raises UserError if
        they cannot be read, do not fit or are damaged."""
        record = self._read(step, record=ocp.args.JsonRestore())["record"]
        has_readout = isinstance(record, dict) and _READOUT_CHECKSUMS in record
        name = "readout" if has_readout else "params"
        shardings = jax.tree.map(lambda _: replicated(mesh), abstract)
        params = self._read(step, **{name: ocp.args.StandardRestore(_placed(abstract, shardings))})[name]
        if has_readout:
            self._checked(step, record, params, _READOUT_CHECKSUMS)
        else:
            self._checked(step, record, params, part=slice(1, 1 + len(jax.tree.leaves(params))))  # after the step
        return params

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: they do not belong to a run that goes on from `step`."""
        for later in self.steps():
            if later > step:
                self._guarded(lambda later=later: self._manager.delete(later), "deleted")

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames the checkpoints of later steps to unread-<step>: what could not be read today may be read tomorrow,
        and must not stand where the run will save. Returns the new paths, to process 0 alone."""
        moved, later_steps = [], [later for later in self.steps() if later > step]
        with together(), _one_line_errors(self._folder):
            if jax.process_index() == 0:
                for later in later_steps:
                    moved.append((self._folder / str(later)).rename(self._unread(later)))
        self._manager.reload()
        return moved

    def add_loss(self, step: int, val_loss: float) -> None:
        """Adds the validation loss to a checkpoint that was saved without: only with one it can be the best."""
        self._guarded(self._manager.wait_until_finished)
        with together(), _one_line_errors(self._folder):
            if jax.process_index() == 0:
                path = self._folder / str(step) / _LOSS
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, json.dumps({"val_loss": val_loss}).encode())
        self._manager.reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._stack:
            self._reader.close()
            self._guarded(self._manager.close)

    def _unread(self, step: int) -> Path:
        names = itertools.chain([f"unread-{step}"], (f"unread-{step}-{n}" for n in itertools.count(2)))
        return next(path for name in names if not (path := self._folder / name).exists())

    def _read(self, step: int, **items) -> Any:
        self._guarded(self._manager.wait_until_finished)
        ignore_leftovers()
        try:
            return self._reader.restore(self._orbax_folder / str(step), args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            # Orbax says which part of which array, its cause what is wrong with which file.
            reason = _short(error.__cause__ or error)
            raise UserError(f"checkpoint {step} in {self._folder} cannot be read: {reason}") from None

    def _checked(
        self, step: int, record: Any, tree: Any, name: str = "checksums", part: slice = slice(None)
    ) -> dict[str, Any]:
        """The record, if `part` of its checksums of that name are those of `tree`. Raises UserError if either is
        damaged."""
        fault = None
        if not isinstance(record, dict) or not isinstance(record.get(name), list):
            fault = "it has no checksums"
        elif record[name][part] != jax.device_get(_checksums(tree)).tolist():
            fault = "its checksums do not match"
        elif record.get("crc32", _crc32(record)) != _crc32(record):
            fault = "the checksum of its record does not match"
        if fault:
            raise UserError(f"checkpoint {step} in {self._folder} is damaged: {fault}")
        return record

    def _guarded(self, action: Callable[[], Any], what: str = "saved") -> None:
        """Turns a failed save (a full disk, a folder taken away) into one line; a background save fails here too."""
        try:
            action()
        except UserError:
            raise
        except Exception as error:
            if self._read_only:
                raise UserError(f"the checkpoints in {self._folder} cannot be read: {_short(error)}") from None
            raise UserError(
                f"a checkpoint could not be {what} in {self._folder}: {_short(error)}; "
                "earlier checkpoints are whole: make room and resume"
            ) from None


@contextlib.contextmanager
def saved_checkpoints(run_dir: Path) -> Iterator[tuple[Checkpoints, list[int]]]:
    """Those of a run, to be read, and their steps, newest first. Raises UserError if there are none."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir} holds no checkpoints; give the folder of a run that saved one")
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{folder} holds no finished checkpoint; give the folder of a run that saved one")
        yield checkpoints, steps


def load_params(
    run_dir: Path, abstract: Params, mesh: Mesh, step: int | None = None, *, own_model: bool = False
) -> tuple[Params, int]:
    """Weights, in the types of `abstract`, and step of a run's checkpoint of `step`, or of its newest one.

    Raises UserError if there is none or it does not fit, and for a run of a program's own model unless `own_model` says
    that `abstract` is of one.
    """
    with saved_checkpoints(run_dir) as (checkpoints, steps):
        if step is None:
            step = steps[0]
        elif step not in steps:
            there = ", ".join(map(str, reversed(steps)))
            folder = run_dir / "checkpoints"
            raise UserError(f"--step {step}: {folder} holds no checkpoint of this step; it holds: {there}")
        config, _ = read_config(run_dir / "config.json")
        if config.own_model is not None and not own_model:
            raise UserError(
                f"{run_dir} holds a run of a program's own model ({config.own_model}); use it there: "
                "senano_jax.Run(folder, model)"
            )
        # Read in the types they were saved in: the checksums are of those bits.
        saved = abstract if config.own_model else abstract_params(make_model(config.model, config.dtype))
        if jax.tree.structure(saved) != jax.tree.structure(abstract):
            raise UserError(f"{run_dir} holds a run of another model; give that of the same preset and --model.layers")
        as_saved = jax.tree.map(lambda wanted, s: jax.ShapeDtypeStruct(wanted.shape, s.dtype), abstract, saved)
        params = checkpoints.restore_params(step, as_saved, mesh)
        return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, abstract), step


@jax.jit
def _checksums(tree: Any) -> jax.Array:
    """A sum of each array's bits, uint32: orbax does not notice every damaged byte."""

    def checksum(x):
        # Somebody's optimiser may keep flags and keys.
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        elif jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, bits), dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _crc32(record: dict[str, Any]) -> int:
    rest = {name: value for name, value in record.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _drop_damaged_losses(folder: Path) -> None:
    """Removes validation losses that cannot be read: their checkpoints count as not evaluated."""
    for path in folder.glob(f"[0-9]*/{_LOSS}"):
        try:
            sound = math.isfinite(json.loads(path.read_bytes())["val_loss"])
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            sound = False
        if not sound:
            shutil.rmtree(path.parent)


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever lies there
        reason = getattr(error, "strerror", None) or _short(error)
        raise UserError(f"{folder} cannot be used for checkpoints ({reason})") from None


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
