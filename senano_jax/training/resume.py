"""Beginning a run, or going on with one that was stopped: is it the same run, and from which checkpoint?"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from senano_jax.config import Config, settings
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.model.build import count_parameters
from senano_jax.runlog.data_record import DataRecord
from senano_jax.runlog.writer import RunFolder, new_run_dir
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.processes import together
from senano_jax.training.state import TrainState, init_state, params_to_evaluate, with_params
from senano_jax.training.weights import load_weights
from senano_jax.training.wiring import Wiring


class Bookmark(NamedTuple):
    """What is saved beside the state: all else that a run needs to go on."""

    step: int  # steps done
    next_token: int  # of the stream
    train_ms: float
    evaluated: bool  # the weights after this step
    run_folder: dict[str, int]  # bytes of its files


class OpenRun(NamedTuple):
    """The folder of a run, locked, and what is kept in it."""

    folder: RunFolder
    checkpoints: Checkpoints
    data_record: DataRecord

    def save(self, step: int, state: TrainState, next_token: int, train_ms: float, val_loss: float | None) -> None:
        """Starts to save a checkpoint; `val_loss` is that of its weights, if they have been evaluated. Raises UserError
        after that if the checksums of the shards could not be taken or written: training is not lost for them."""
        bookmark = Bookmark(step, next_token, train_ms, val_loss is not None, self.folder.position())
        params = params_to_evaluate(state)
        readout = None if params is state.params else params
        try:
            self.data_record.wait()
        finally:
            self.checkpoints.save(step, state, bookmark._asdict(), val_loss, readout)

    def newest_checkpoint(self) -> int | None:
        """Its step, once it is completely on disk; None if there is none."""
        return next(iter(self.checkpoints.steps()), None)


def require_shared_folder(config: Config) -> None:
    """Raises UserError for several processes that would make a folder each. JAX must have been started."""
    if jax.process_count() > 1 and config.run_dir is None:
        raise UserError("a run of several processes needs --run-dir, the same folder for all of them")


@contextlib.contextmanager
def open_run(config: Config, preset: str, shards: Mapping[str, Sequence[Path]]) -> Iterator[OpenRun]:
    """For a run that reads these `shards` of each part. Raises UserError if its folder is in use, cannot be written, or
    holds a run that `config` does not resume."""
    run = RunFolder(expand_home(config.run_dir or new_run_dir(preset)))
    with contextlib.ExitStack() as stack:
        with together():
            stack.enter_context(run)
            if config.resume is None:
                run.refuse_if_started()
        folder = run.path / "checkpoints"
        checkpoints = stack.enter_context(Checkpoints(folder, config.checkpoint_keep, config.checkpoint_keep_every))
        yield OpenRun(run, checkpoints, stack.enter_context(DataRecord(run.path, shards)))


def begin_or_resume(
    wiring: Wiring, preset: str, run: OpenRun, say: Callable[[str], None]
) -> tuple[TrainState, Bookmark] | None:
    """State and bookmark of a new run or of the one in the folder, whose records now end there.

    None if that run is complete; it is left as it is. Raises UserError, before anything is changed, if the run cannot
    begin or go on.
    """
    config, mesh, checkpoints = wiring.plan.config, wiring.mesh, run.checkpoints
    restored = None if config.resume is None else restore(checkpoints, config.resume, wiring.state, mesh, say)
    if restored is not None:
        state, bookmark = restored
        with together():
            run.folder.require(bookmark.run_folder)
        if bookmark.step == config.steps and bookmark.evaluated:
            return None
    else:
        state = init_state(wiring.model, wiring.optimizer, config.seed, mesh)
        bookmark = Bookmark(0, 0, 0.0, evaluated=False, run_folder={"metrics": 0, "log": 0})
        if config.init_from is not None:
            params, _ = load_weights(
                config.init_from, config.model, wiring.state.params, mesh, own_model=config.own_model is not None
            )
            state = with_params(state, params, mesh)
    if config.resume is None:
        with together():  # only now: a run that could not begin leaves no folder that looks like one
            run.data_record.start()
            run.folder.start(config, preset, count_parameters(wiring.state.params))
        return wiring.to_shared(state), bookmark
    with together():
        run.data_record.go_on(say, bookmark.step)
    # Only now that nothing can refuse the run any more: it does their steps again, and saves them again. And before the
    # lines of these steps are cut off: no checkpoint may be ahead of them, wherever this is interrupted.
    if config.resume == "latest":
        for path in checkpoints.set_aside_after(bookmark.step):
            say(f"kept as {path} what could not be read; delete it if it is damaged")
    else:
        checkpoints.delete_after(bookmark.step)
    with together():
        run.folder.go_on(bookmark.run_folder)
    return wiring.to_shared(state), bookmark


def check_same_run(config: Config, run_dir: Path) -> None:
    """Raises UserError naming the fields in which `config` differs from the run in `run_dir`."""
    saved, given = settings(read_config(run_dir / "config.json")[0]), settings(config)
    different = [name for name in saved | given if saved.get(name) != given.get(name)]
    if different:
        differences = ", ".join(f"{name} {saved.get(name)} -> {given.get(name)}" for name in different)
        raise UserError(
            f"--resume: the run in {run_dir} has another configuration ({differences}); "
            "drop these flags, or start a new run"
        )


def require_checkpoint(wanted: int | str, steps: Sequence[int]) -> None:
    """Raises UserError if the step to resume at is none of `steps`, those of the checkpoints, newest first."""
    if wanted != "latest" and wanted not in steps:
        there = ", ".join(map(str, reversed(steps))) or "none"
        raise UserError(f"--resume {wanted}: there is no checkpoint of this step; there are: {there}")


def restore(
    checkpoints: Checkpoints, wanted: int | str, abstract: TrainState, mesh: Mesh, say: Callable[[str], None]
) -> tuple[TrainState, Bookmark] | None:
    """State and bookmark of checkpoint `wanted`, or for "latest" of the newest one that every process can read.

    Returns None for "latest" if the run was stopped before its first checkpoint. Raises UserError if the step asked
    for is not there, or if all checkpoints are damaged.
    """
    steps = checkpoints.steps()
    if wanted != "latest":
        require_checkpoint(wanted, steps)
        return _restore_together(checkpoints, int(wanted), abstract, mesh)
    for older, step in enumerate(steps, start=1):
        try:
            return _restore_together(checkpoints, step, abstract, mesh)
        except UserError as error:
            if older == len(steps):
                raise
            say(f"{error}; going back to that of step {steps[older]}")
    return None


def _restore_together(
    checkpoints: Checkpoints, step: int, abstract: TrainState, mesh: Mesh
) -> tuple[TrainState, Bookmark]:
    with together():
        state, record = checkpoints.restore(step, abstract, mesh)
        missing = [name for name in Bookmark._fields if name not in record]
        if missing:
            raise UserError(
                f"checkpoint {step} does not say where the run was (its record lacks {', '.join(missing)}); "
                "use its weights with --init-from"
            )
    return state, Bookmark(*(record[name] for name in Bookmark._fields))
