"""What a run measures, as it becomes known: into the run folder and onto the screen."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from senano_jax.errors import UserError
from senano_jax.optim.config import OwnOptimizer
from senano_jax.optim.recipe import schedule_values
from senano_jax.plan import Plan, StepInputs
from senano_jax.runlog.progress import Progress
from senano_jax.runlog.sinks import Record, Sinks
from senano_jax.runlog.writer import RunFolder
from senano_jax.training.clock import Clock
from senano_jax.training.step import StepMetrics


class FinishedStep(NamedTuple):
    """A step whose metrics have arrived."""

    loss: float
    grad_norm: float
    train_ms: float  # training time when its metrics had arrived
    stop: bool  # a process had been told to stop before it began


class RunningStep(NamedTuple):
    """A step that the devices may still be working on."""

    step: int  # counted from 1
    finished: Future[FinishedStep]
    inputs: StepInputs
    tokens_read: int  # position of the stream after it


def wait_for_step(metrics: StepMetrics, stop: jax.Array | bool, clock: Clock) -> FinishedStep:
    """For a thread of its own: the main one is busy queuing the next step while this one ends."""
    return FinishedStep(float(metrics.loss), float(metrics.grad_norm), clock.milliseconds, bool(stop))


class Recorder:
    """Writes a line for every step and evaluation; `newest_checkpoint` tells what a failed run can go back to.
    `on_record` is called with each line of metrics.jsonl, as a dictionary.

    A step is recorded once the next one is queued behind it, so that no device waits. Whatever waits for one raises
    UserError if its loss or gradient is not finite, once that is recorded, so that comparisons see it.
    """

    def __init__(
        self,
        run: RunFolder,
        sinks: Sinks,
        progress: Progress,
        clock: Clock,
        plan: Plan,
        newest_checkpoint: Callable[[], int | None],
        on_record: Callable[[Record], None] | None = None,
    ):
        self._run, self._sinks, self._progress, self._clock, self._plan = run, sinks, progress, clock, plan
        self._newest_checkpoint, self._on_record = newest_checkpoint, on_record
        self._finished_ms = clock.milliseconds
        self._running: RunningStep | None = None  # the newest step
        self.stopping = False  # a recorded step found that the run should stop
        # All at once: a scalar from the device would wait for the step it is running.
        recipe = plan.config.optimizer
        self._schedules = {} if isinstance(recipe, OwnOptimizer) else schedule_values(recipe, plan.steps)
        if any(stage.rate != 1 for stage in plan.stages):
            rates = [plan.stage(step).rate for step in range(plan.steps)]
            self._schedules["lr"] = self._schedules.get("lr", np.float32(1)) * rates

    def say(self, line: str) -> None:
        """A line for the screen and for log.txt."""
        self._run.log(line)
        self._progress.say(line)

    def queued(self, step: RunningStep) -> None:
        """Takes a new step, and waits for the one before it."""
        self.catch_up()
        self._running = step

    def catch_up(self) -> None:
        """Waits for the newest step."""
        if self._running is not None:
            self._record(self._running)
            self._running = None

    def _record(self, running: RunningStep) -> None:
        step, plan = running.step, self._plan
        loss, grad_norm, train_ms, stop = running.finished.result()
        started_ms, self._finished_ms = self._finished_ms, train_ms
        step_ms = self._finished_ms - started_ms
        tokens_per_s = plan.stage(step - 1).batch_tokens / step_ms * 1000
        self._metric(
            step=step,
            tokens_trained=plan.tokens_after(step),
            tokens_read=running.tokens_read,
            loss=loss,
            grad_norm=grad_norm,
            **{name: float(values[step - 1]) for name, values in self._schedules.items()},
            window=int(running.inputs.window_blocks),
            step_ms=round(step_ms, 3),
            tokens_per_s=round(tokens_per_s, 1),
        )
        line = f"step:{step}/{plan.steps} {self._times(self._finished_ms, step)} loss:{loss:.4f}"
        self._run.log(line)
        self._progress.step(step, loss, tokens_per_s, f"{line} tokens/s:{tokens_per_s:.0f}")
        self.stopping |= stop
        if not math.isfinite(loss + grad_norm):
            saved = self._newest_checkpoint()
            kept = "no checkpoint was saved" if saved is None else f"the newest checkpoint is that of step {saved}"
            raise UserError(
                f"step {step} has loss {loss} and gradient norm {grad_norm}; {kept}; "
                "lower the learning rates, or look at the data"
            )

    def evaluation(self, step: int, val_loss: float, window: int) -> None:
        """Records an evaluation after `step` steps, with the clock stopped. Raises UserError if it is not finite."""
        tokens, train_ms = self._plan.tokens_after(step), self._clock.milliseconds
        self._metric(
            step=step, tokens_trained=tokens, val_loss=val_loss, window=window, train_time_ms=round(train_ms, 3)
        )
        times = self._times(train_ms, step)
        self.say(f"step:{step}/{self._plan.steps} val_loss:{val_loss:.4f} {times} tokens:{tokens / 1e6:.2f}M")
        if not math.isfinite(val_loss):
            raise UserError(f"the validation loss after step {step} is {val_loss}; look at the weights and the data")

    def _metric(self, **record: float) -> None:
        self._run.metric(**record)
        self._sinks.write(record)
        if self._on_record is not None:
            self._on_record(record)

    @staticmethod
    def _times(train_ms: float, step: int) -> str:
        return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
