"""Text logs of PyTorch programs and of llm.c: one run or several, in any of the dialects of dialects.py.

The rest of the file (the program's source, the output of nvidia-smi) is passed over, except for lines that look like
an evaluation and cannot be read.
"""

import dataclasses
import re
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.runlog.batch_plan import BatchPlan
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.dialects import KNOWN, Record, read_record, tokens_of_a_step
from senano_jax.runlog.log_lines import Line, read_lines
from senano_jax.runlog.text_run import TextRun, note_on, shape

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b.|\[[0-9]{1,2}(;[0-9]{1,3})*m")
_COMMENT = re.compile(r"(^|\s)#\s")  # of a dumped program; a progress bar has no blank on both sides of its signs
_BEGUN = re.compile(r"(?<![a-z_])(step:? ?[0-9]|s:[0-9]|val[_ ]l)", re.IGNORECASE)  # a record, it may be


def read_torch_log(
    path: Path, name: str, tokens_per_step: int | None = None, batch: BatchPlan | None = None
) -> list[RunLog]:
    """The runs in one log, at least one. Tokens are those of its lines, else those of `batch`, else of the batch that
    the program announces, else of steps of `tokens_per_step`.

    Raises UserError for a damaged log, one without evaluations, or one whose tokens nobody knows.
    """
    reading = _Reading(path, batch, tokens_per_step)
    for line in read_lines(path):
        reading.take(line)
    return reading.runs(name)


class _Reading:
    """One pass over a file."""

    def __init__(self, path: Path, batch: BatchPlan | None, tokens_per_step: int | None):
        self._path, self._given, self._fallback = path, batch, tokens_per_step
        self._announced: int | None = None  # tokens of a step
        self._batches: dict[int, None] = {}  # of those that were announced, what tokens were counted by
        self._runs: list[TextRun] = []
        self._passed_over: dict[str, list[int]] = {}  # the numbers of the lines, by what they are
        self._in_bytes = False

    def take(self, line: Line) -> None:
        text = _COLOUR.sub("", line.text) if "[" in line.text or "\x1b" in line.text else line.text
        if "#" in text and (comment := _COMMENT.search(text)):
            self._comment(line, text[comment.end() :])
            text = text[: comment.start()]
        line = line._replace(text=text.strip())
        if (announced := tokens_of_a_step(line.text)) is not None:
            self._announced = announced
        try:
            record = read_record(line)
        except UserError:
            if line.ended:
                raise
            record = None
        if not line.ended and not self._is_whole(line, record):
            if _BEGUN.search(line.text):
                self._pass_over("{} is cut off and was passed over", line)
        elif record is not None:
            self._add(line, record)

    def _add(self, line: Line, record: Record) -> None:
        if record.in_bytes:
            self._in_bytes = True
        elif record.step is None:
            self._pass_over("{}: a validation loss without a step was passed over", line)
        else:
            if not self._runs or self._runs[-1].is_followed_by(record):
                self._runs.append(TextRun(self._path, line.number))
            run = self._runs[-1]
            if run.repeats(record):
                if record.val_loss is not None:
                    self._pass_over("{} repeats an evaluation and was passed over", line)
            else:
                run.check(line, record)
                run.add(line, record, self._tokens(line, record))

    def _tokens(self, line: Line, record: Record) -> int | None:
        """Trained on at the record; None for a step of training whose tokens the log does not count."""
        if record.tokens is not None:
            if self._given:
                line.damaged("the log counts its tokens itself", "leave out the @ behind its name; the line is")
            return record.tokens
        if self._given:
            return self._given.tokens_after(record.step)
        if self._announced:
            self._batches[self._announced] = None
        if batch := self._announced or self._fallback:
            return record.step * batch
        if record.val_loss is None:
            return None
        grows = " and a batch that grows" if self._announced == 0 else ""
        raise UserError(
            f"{line.path}, line {line.number}: no tokens: field{grows}; give --tokens-per-step, the batch in tokens "
            "(e.g. 393216), or LOG@393216 for this log alone"
        )

    def _comment(self, line: Line, text: str) -> None:
        try:
            record = read_record(line._replace(text=text))
        except UserError:
            return
        if record and record.val_loss and (record.time_ms is not None or not record.text.startswith("step:")):
            self._pass_over("{}: an evaluation in a comment (#) was passed over", line)

    def _is_whole(self, line: Line, record: Record | None) -> bool:
        """Whether the last line, which no line break ends, is not cut off: it ends in a unit and has all the fields, or
        it has the signs of an evaluation before it, digit for digit behind the points."""
        if record is None:
            return False
        shapes = [known for run in self._runs for known in run.shapes]
        if shape(record.text) in shapes:
            return True
        if not record.text[-1:].isalpha() or record.time_ms is None:
            return False
        return record.val_loss is None or not shapes or _fields(shapes[-1]) == _fields(record.text)

    def _pass_over(self, what: str, line: Line) -> None:
        self._passed_over.setdefault(what, []).append(line.number)

    def runs(self, name: str) -> list[RunLog]:
        notes = [note_on(what, numbers) for what, numbers in self._passed_over.items()]
        if self._batches:
            batches = " and ".join(f"{batch:,}" for batch in self._batches)
            notes.append(f"its tokens are counted in steps of {batches}, as the log says")
        if not any(run.is_evaluated for run in self._runs):
            reason = "no validation loss in it"
            if self._in_bytes:
                reason = "no validation loss in it, only bits a byte, which depend on the tokenizer"
            found = "".join(f"; {note}" for note in notes)
            raise UserError(
                f"{self._path}: {reason}{found}; give the log of a run that has evaluated, with lines like {KNOWN}"
            )
        logs, seen = [], set()
        for run in self._runs:
            if not run.is_evaluated:
                notes.append(f"the run that begins in line {run.first_line} has not evaluated and was passed over")
                continue
            logs.append(log := run.log(name))
            if log.points in seen:
                notes.append(f"the run that begins in line {run.first_line} equals another one: is it one run twice?")
            seen.add(log.points)
        return [dataclasses.replace(logs[0], notes=(*notes, *logs[0].notes)), *logs[1:]]


def _fields(text: str) -> set[str]:
    return set(re.findall(r"(?<!\w)([A-Za-z_]\w*):", text))
