"""The lines of a log somebody else may have damaged: bounded in memory, and every complaint names file and line."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from senano_jax.errors import UserError
from senano_jax.runlog.curves import TrainPoint, ValidationPoint

MAX_LINE_BYTES = 1 << 16  # the longest line of a dumped source file or of our metrics is far below
MAX_FILE_BYTES = 1 << 26  # a run of 20,000 steps writes 5 MB
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_ONE_RUN = "keep the lines of one run only:"
_LARGEST = {  # beyond what any run reaches, and far below what floats cannot count
    "step": 1e12,
    "total": 1e12,
    "tokens": 1e15,
    "tokens_trained": 1e15,
    "tokens_read": 1e15,
    "train_time_ms": 1e13,
    "val_loss": 1e6,
    "loss": 1e6,
}


class Line(NamedTuple):
    """One line of a log, without its end."""

    path: Path
    number: int  # from 1
    text: str
    ended: bool  # False for a last line without line break: its writer may have been stopped inside it

    def damaged(self, reason: str, remedy: str = "mend or delete the line") -> NoReturn:
        """Raises the UserError for this line."""
        excerpt = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        raise UserError(f"{self.path}, line {self.number}: {reason}; {remedy} {excerpt!r}")

    def number_of(self, field: str, text: object) -> float:
        """`text`, a string or a JSON value, as the value of `field`: finite, not negative and of a sane size."""
        if isinstance(text, str) and _NUMBER.fullmatch(text):
            value = float(text)
        elif isinstance(text, int | float) and not isinstance(text, bool):
            value = min(text, 1e300) if isinstance(text, int) else text  # float() of a huge int would raise
        else:
            self.damaged(f"{field} is {str(text)[:40]!r}, not a finite number")
        if not math.isfinite(value):
            self.damaged(f"{field} is {value}, not a finite number")
        if value < 0:
            self.damaged(f"{field} is negative ({value:g})")
        if value > _LARGEST[field]:
            self.damaged(f"{field} is {value:g}, which no run reaches")
        return value

    def count_of(self, field: str, value: object) -> int:
        """Like `number_of`, for a whole number."""
        number = self.number_of(field, value)
        if number != int(number):
            self.damaged(f"{field} is {number:g}, not a whole number")
        return int(number)


def is_not_finite(value: object) -> bool:
    """Whether a log says by `value`, a string or a JSON value, that a loss is infinite or not a number."""
    if isinstance(value, str):
        return _NOT_FINITE.fullmatch(value) is not None
    return isinstance(value, float) and not math.isfinite(value)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a UTF-8 text file. A progress bar returns the carriage: what stands between two carriage returns is
    a line of the same number. Raises UserError for a file that is not text, or is too large to be a log.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; give a run folder, a PyTorch log or published:NAME")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; copy the log to a file first")
    read = 0
    try:
        with path.open("rb") as file:
            number = 1
            while raw := file.readline(MAX_LINE_BYTES + 1):
                if len(raw) > MAX_LINE_BYTES:
                    end = raw.rfind(b"\r") + 1
                    if not end:
                        raise UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; this is not a log")
                    file.seek(end - len(raw), os.SEEK_CUR)
                    raw = raw[:end]
                read += len(raw)
                if read > MAX_FILE_BYTES:
                    raise UserError(
                        f"{path}, line {number}: the file is larger than {MAX_FILE_BYTES >> 20} MiB; "
                        "keep its step: lines only"
                    )
                if b"\0" in raw:
                    raise UserError(f"{path}, line {number}: a zero byte; the file is binary or damaged")
                try:
                    text = raw.decode("utf-8-sig" if read == len(raw) else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: byte {error.start + 1} is not UTF-8; the file is binary or damaged"
                    ) from None
                pieces = text.rstrip("\r\n").split("\r")
                for piece in pieces[:-1]:
                    yield Line(path, number, piece, True)
                yield Line(path, number, pieces[-1], raw.endswith((b"\n", b"\r")))
                number += raw.endswith(b"\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the disk and its permissions"
        ) from None


class PointCollector:
    """Gathers the points of a run and refuses those that cannot follow the ones before."""

    def __init__(self, path: Path):
        self._path = path
        self._refused: tuple[Line, object] | None = None  # the first evaluation that is not finite
        self.diverged: str | None = None  # where the loss stopped being finite, unless it was finite again
        self.validation: list[ValidationPoint] = []
        self.train: list[TrainPoint] = []

    def add_validation(self, line: Line, step: int | None, tokens: int, loss: object, time: float | None) -> None:
        """`loss` is what the log has for it; one that is not finite makes no point, but a diverged run."""
        finite = not is_not_finite(loss)
        point = ValidationPoint(step, tokens, line.number_of("val_loss", loss) if finite else math.nan, time)
        if self.validation:
            last = self.validation[-1]
            if point.step is not None and last.step is not None and point.step <= last.step:
                line.damaged(f"evaluation of step {point.step} after that of step {last.step}", _ONE_RUN)
            if point.tokens < last.tokens:
                line.damaged(f"tokens fall from {last.tokens} to {point.tokens}", _ONE_RUN)
            if (point.train_time_ms or 0) < (last.train_time_ms or 0) and point.train_time_ms is not None:
                line.damaged(f"train_time falls from {last.train_time_ms:.0f} to {point.train_time_ms:.0f} ms")
        if not finite:
            self._refused = self._refused or (line, loss)
            self.diverged = self.diverged or (f"{tokens:,} tokens" if step is None else f"step {step}")
            return
        if self._refused:
            refused, spelt = self._refused
            refused.number_of("val_loss", spelt)  # weights that are no numbers stay so: the line is damaged
        self.diverged = None
        self.validation.append(point)

    def add_train(
        self,
        line: Line,
        step: int,
        tokens: int | None,
        loss: object,
        time: float | None,
        tokens_read: int | None = None,
    ) -> None:
        """`loss` is what the log has for it, None if it has none."""
        if self.train and step <= self.train[-1].step:
            line.damaged(f"step {step} after step {self.train[-1].step}", _ONE_RUN)
        finite = not is_not_finite(loss)
        if finite and loss is not None:
            loss = line.number_of("loss", loss)
            self.diverged = self.diverged if self._refused else None
        elif not finite:
            self.diverged = self.diverged or f"step {step}"
        self.train.append(TrainPoint(step, tokens, loss if finite else None, time, tokens_read))

    def go_back(self, step: int, evaluated: bool) -> bool:
        """Forgets what came after `step`, the next one, which is evaluated or trained; False if nothing did."""
        kept = len(self.validation), len(self.train)
        while self.validation and self.validation[-1].step >= step:
            self.validation.pop()
        while self.train and self.train[-1].step >= step + evaluated:
            self.train.pop()
        if kept == (len(self.validation), len(self.train)):
            return False
        self.diverged = self._refused = None
        return True

    def evaluations(self) -> tuple[ValidationPoint, ...]:
        """All of them; raises UserError if there is none and the run has not diverged."""
        if not self.validation and not self.diverged:
            raise UserError(f"{self._path}: no validation loss in it; give the log of a run that has evaluated")
        return tuple(self.validation)
