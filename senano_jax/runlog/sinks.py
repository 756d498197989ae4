"""Where a run can be watched: TensorBoard and Weights & Biases, given what metrics.jsonl gets.

The run folder stays the record. A tool that fails once the run has begun is left out from then on, with a warning.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.files import write_atomically
from senano_jax.plan import Plan

OF_STEP = ("loss", "grad_norm", "lr", "momentum", "window", "tokens_per_s")
OF_EVALUATION = ("val_loss",)
LOSSES = ("loss", "val_loss")

Record = Mapping[str, Any]  # a line of metrics.jsonl, of a step or of an evaluation


class Sink(Protocol):
    """`Sink(config, run_dir, first_step)` opens it; points after `first_step` replace those of an earlier part of the
    run (all do, if it is 0), where the service can: W&B keeps what it has of a step."""

    flag: str
    package: str
    remedy: str  # where it cannot be opened

    def __init__(self, config: Config, run_dir: Path, first_step: int): ...

    def write(self, record: Record) -> None:
        """Shows a line of metrics.jsonl."""

    def close(self, failed: bool) -> None:
        """At the end of the run, whether it `failed` or not."""


class TensorBoard:
    """Event files in RUN_DIR/tensorboard: `steps` holds the values over steps, `tokens` the losses over tokens."""

    flag, package = "--tensorboard", "tensorboardX"
    remedy = "make room, or drop the flag"

    def __init__(self, config: Config, run_dir: Path, first_step: int):
        folder = run_dir / "tensorboard"
        replaced = first_step + 1 if first_step else 0
        self._steps = _EventFile(folder / "steps", replaced)
        self._tokens = _EventFile(folder / "tokens", Plan(config).tokens_after(replaced))

    def write(self, record: Record) -> None:
        """Adds the values of a step or an evaluation, and its losses over tokens."""
        values = _values(record)
        self._steps.add(record["step"], values)
        # Other names, or TensorBoard would draw both into one chart.
        losses = {f"{name}_over_tokens": values[name] for name in LOSSES if name in values}
        self._tokens.add(record["tokens_trained"], losses)

    def close(self, failed: bool) -> None:
        """Closes both files."""
        self._steps.close()
        self._tokens.close()


class _EventFile:
    """Scalars over one axis. TensorBoard hides what older files in `folder` hold from `replaced` on.

    Each point is on disk when `add` returns. SummaryWriter has a thread for that, and when a full disk ends the thread,
    its queue fills up and blocks the run.
    """

    def __init__(self, folder: Path, replaced: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The writer's own name ends in seconds and the host: not enough for a run resumed within one.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=replaced, session_log=start))

    def add(self, x: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.write_event(self._event(wall_time=time.time(), step=x, summary=self._summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT, or senano_jax; resumed under the same id, which RUN_DIR/wandb_id keeps."""

    flag, package = "--wandb", "wandb"
    remedy = "run `wandb login`, set WANDB_MODE=offline, or drop the flag"

    def __init__(self, config: Config, run_dir: Path, first_step: int):
        import wandb

        id_file = run_dir / "wandb_id"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "senano_jax"),
            name=run_dir.name,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            dir=run_dir,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(console="off"),
        )
        write_atomically(id_file, self._run.id.encode())
        for name in ("tokens_trained", *OF_STEP, *OF_EVALUATION):
            self._run.define_metric(name, step_metric="step")

    def write(self, record: Record) -> None:
        """Logs the values of a step or an evaluation, unless they are there already."""
        # W&B's own counter only grows, and a resumed run begins with it behind the points that are there: counting
        # steps and evaluations in their order, a point that is there already is known.
        index = 2 * record["step"] + ("val_loss" in record)
        if index >= self._run.step:
            places = {name: record[name] for name in ("step", "tokens_trained")}
            self._run.log(places | _values(record), step=index, commit=True)

    def close(self, failed: bool) -> None:
        """Finishes the run there; a failed one is marked as such."""
        self._run.finish(exit_code=int(failed))


class Sinks:
    """Those that the flags of a run ask for: `open` once, `write` for each line of metrics.jsonl.

    In a job of several processes only process 0 has any. Raises UserError if a package is not installed.
    """

    def __init__(self, config: Config):
        self._config = config
        self._asked: list[type[Sink]] = [TensorBoard] * config.tensorboard + [WeightsAndBiases] * config.wandb
        self._open: list[Sink] = []
        for kind in self._asked:
            try:
                importlib.import_module(kind.package)
            except ImportError as error:
                raise UserError(
                    f"{kind.flag} needs {kind.package} ({error}); run: pip install 'senano-jax[tracking]'"
                ) from None

    def open(self, run_dir: Path, first_step: int, say: Callable[[str], None]) -> "Sinks":
        """Opens them for a run that begins or goes on after `first_step` steps. `say` takes the warnings.

        Returns itself, a context manager. Raises UserError if one cannot be opened.
        """
        self._say = say
        for kind in self._asked if jax.process_index() == 0 else []:
            try:
                self._open.append(kind(self._config, run_dir, first_step))
            except Exception as error:
                self._close(failed=True)
                raise UserError(f"{kind.flag} cannot be started ({_short(error)}); {kind.remedy}") from None
        return self

    def write(self, record: Record) -> None:
        """Gives every tool a line of metrics.jsonl; one that fails is left out from then on."""
        for sink in list(self._open):
            try:
                sink.write(record)
            except Exception as error:
                self._open.remove(sink)
                self._say(f"{sink.flag} failed at step {record['step']} ({_short(error)}); the run goes on without it")

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._close(failed=kind is not None)

    def _close(self, failed: bool) -> None:
        for sink in self._open:
            try:
                sink.close(failed)
            except Exception as error:
                self._say(f"{sink.flag} could not be closed ({_short(error)})")
        self._open = []


def _values(record: Record) -> dict[str, float]:
    names = OF_EVALUATION if "val_loss" in record else OF_STEP
    return {name: record[name] for name in names if name in record}  # not every optimiser has a momentum


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
