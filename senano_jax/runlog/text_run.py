"""One run in a text log: which lines are its, where it ends, and what is known of it."""

import re
from collections.abc import Sequence
from pathlib import Path

from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.dialects import Record
from senano_jax.runlog.log_lines import Line, PointCollector


class TextRun:
    """One run of a file, as far as it is read."""

    def __init__(self, path: Path, first_line: int):
        self.first_line = first_line
        self.shapes: dict[str, None] = {}  # of its evaluations
        self._path, self._points = path, PointCollector(path)
        self._by, self._total, self._stopped = "PyTorch", None, None
        self._first_step = self._last_step = None
        self._clock: float | None = None
        self._losses: dict[int, str] = {}  # as they are spelt, by step
        self._went_back: list[int] = []  # numbers of lines

    @property
    def is_evaluated(self) -> bool:
        """Whether it holds a validation loss."""
        return bool(self._losses)

    @property
    def is_complete(self) -> bool:
        """Whether the last planned step was evaluated; of a run that does not tell its length, the last step."""
        if not self._points.validation or self._points.diverged:
            return False
        evaluated, planned = self._points.validation[-1].step, self._stopped or self._total
        if planned is not None:
            return evaluated == planned
        return not self._points.train or self._points.train[-1].step <= evaluated + 1

    def is_followed_by(self, record: Record) -> bool:
        """Whether another run begins with the record: back at the first step, after the end of this one or with a
        clock that starts again. A log without clock has nothing else to tell."""
        if self._last_step is None or not record.step <= self._first_step < self._last_step:
            return False
        if self.is_complete or None in (record.time_ms, self._clock):
            return True
        return record.time_ms < self._clock

    def repeats(self, record: Record) -> bool:
        """Whether a line is there again: printed by several processes, or in a summary."""
        points = self._points
        evaluated, trained = (kind[-1].step if kind else -1 for kind in (points.validation, points.train))
        if record.val_loss is not None:
            return record.step <= evaluated and self._losses.get(record.step) == record.val_loss
        return record.step == trained >= evaluated and not record.stopped

    def check(self, line: Line, record: Record) -> None:
        """Refuses a line that cannot be of this run."""
        total = record.total if self._total is None else self._total
        if record.total not in (None, total):
            line.damaged(f"a run of {record.total} steps, in a log of {total} steps")
        if total is not None and record.step > total:
            line.damaged(f"step {record.step} of {total}")
        is_evaluation, has_clock = record.val_loss is not None, record.time_ms is not None
        if is_evaluation and not has_clock and self._clock is not None and record.text.startswith("step:"):
            line.damaged("not a complete step line")

    def add(self, line: Line, record: Record, tokens: int | None) -> None:
        """Takes a line that `check` has let pass."""
        self._total = total = record.total if self._total is None else self._total
        if record.stopped:
            self._stopped = record.step
            return
        if total is None and record.time_ms is None and self._points.go_back(record.step, record.val_loss is not None):
            self._went_back.append(line.number)
        if record.val_loss is not None:
            self._points.add_validation(line, record.step, tokens, record.val_loss, record.time_ms)
            self._losses[record.step] = record.val_loss
            self.shapes[shape(record.text)] = None
            self._by = record.by
        else:
            self._points.add_train(line, record.step, tokens, record.train_loss, record.time_ms)
        self._first_step = record.step if self._first_step is None else min(self._first_step, record.step)
        self._last_step = record.step if self._last_step is None else max(self._last_step, record.step)
        self._clock = self._clock if record.time_ms is None else record.time_ms

    def log(self, name: str) -> RunLog:
        """The run as far as it was read, called `name`."""
        points, planned, notes = self._points.evaluations(), self._stopped or self._total, []
        if self._went_back:
            notes.append(note_on("{} goes on from an earlier step; what came after it is left out", self._went_back))
        if planned is None and self.is_complete:
            notes.append("the log does not tell how long the run was to be; its last evaluation counts as final")
        tokens = points[-1].tokens if points else 0
        return RunLog(
            name=name,
            implementation=self._by,
            group_key=f"file {self._path.resolve()}, {self._total} steps",
            points=points,
            train_points=tuple(self._points.train),
            tokens_trained=tokens,
            tokens_read=None,
            complete=self.is_complete,
            steps_total=planned,
            diverged=self._points.diverged,
            planned_tokens=tokens * planned / points[-1].step if planned and points and points[-1].step else None,
            notes=tuple(notes),
        )


def shape(text: str) -> str:
    """`text` with all numbers made equal but for the count of digits behind the point."""
    return re.sub(r"(?<!\.)[0-9]+(?![0-9])", "0", re.sub(r"(?<=\.)[0-9]+", lambda m: "0" * len(m[0]), text))


def note_on(what: str, numbers: Sequence[int]) -> str:
    """`what` with the first of the lines in its place, and how many there are."""
    many = f" ({len(numbers)} such lines)" if len(numbers) > 1 else ""
    return what.format(f"line {numbers[0]}") + many
