"""Logs of the PyTorch projects: sample-efficient-nanogpt, modded-nanogpt, and what prints the same lines.

step:125/1700 val_loss:4.6851 train_time:515188ms step_avg:4121.50ms tokens:49.15M
step:126/1700 train_time:519100ms step_avg:4119.84ms

Older ones print train_loss, seconds, or `step_avg:nanms`, and no tokens. The rest of the file (the program's
source, the output of nvidia-smi) is passed over, except for lines that look like an evaluation and cannot be read.
"""

import re
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.runlog.curves import RunLog, TrainPoint, ValidationPoint
from senano_jax.runlog.log_lines import Line, PointCollector, read_lines

# Where a dumped program has val_loss:{val_loss:.4f}, a log has a figure.
_CANDIDATE = re.compile(r"step:[0-9]|[^#]*\bval_loss:[-+]?([0-9]|(nan|inf)\b)", re.IGNORECASE)
_STEP_LINE = re.compile(
    r"step:(?P<step>[0-9]{1,15})/(?P<total>[0-9]{1,15})"
    r"( val_loss:(?P<val_loss>\S+))?( train_loss:(?P<train_loss>\S+))?"
    r" train_time:(?P<time>\S+?)(?P<time_unit>ms|s)( step_avg:(?P<step_avg>\S+)ms)?"
    r"( tokens:(?P<tokens>[^\sKMBG]+)(?P<token_unit>[KMBG]?))?"
    r"(?P<more>( [A-Za-z_]\w*:\S+)*)\s*",
    re.ASCII,
)
_TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def read_torch_log(path: Path, name: str, tokens_per_step: int | None) -> RunLog:
    """Reads one log. `tokens_per_step` counts the tokens of a log whose lines do not.

    Raises UserError for a damaged log, one without evaluations, or one whose tokens nobody knows.
    """
    collector, notes = PointCollector(path), []
    total = shape = None
    for line in read_lines(path):
        text = line.text.strip()
        if not _CANDIDATE.match(text):
            continue
        match = _STEP_LINE.fullmatch(text)
        fields = {key for key, value in match.groupdict().items() if value} - {"more"} if match else set()
        is_evaluation = "val_loss" in fields
        if not line.ended and (not match or not text[-1].isalpha() or (is_evaluation and fields != (shape or fields))):
            notes.append(f"line {line.number} is cut off and was passed over")
            continue
        if not match:
            line.damaged("not a complete step line")
        if total is None:
            total = line.count_of("total", match["total"])
        elif total != line.count_of("total", match["total"]):
            line.damaged(f"a run of {match['total']} steps, in a log of {total} steps")
        step = line.count_of("step", match["step"])
        if step > total:
            line.damaged(f"step {step} of {total}")
        time = line.number_of("train_time_ms", match["time"]) * (1 if match["time_unit"] == "ms" else 1000)
        if is_evaluation:
            shape = fields
            loss = line.number_of("val_loss", match["val_loss"])
            collector.add_validation(
                line, ValidationPoint(step, _tokens(line, match, step, tokens_per_step), loss, time)
            )
        else:
            loss = line.number_of("loss", match["train_loss"]) if match["train_loss"] else None
            tokens = step * tokens_per_step if tokens_per_step and not match["tokens"] else None
            collector.add_train(line, TrainPoint(step, tokens, loss, time))
    points = collector.evaluations()
    return RunLog(
        name=name,
        implementation="PyTorch",
        group_key=f"file {path.resolve()}",
        points=points,
        train_points=tuple(collector.train),
        tokens_trained=points[-1].tokens,
        tokens_read=None,
        complete=points[-1].step == total,
        steps_total=total,
        notes=tuple(notes),
    )


def _tokens(line: Line, match: re.Match, step: int, tokens_per_step: int | None) -> int:
    if match["tokens"]:
        return round(line.number_of("tokens", match["tokens"]) * _TOKEN_UNITS[match["token_unit"]])
    if tokens_per_step is None:
        raise UserError(
            f"{line.path}, line {line.number}: no tokens: field; "
            "give --tokens-per-step, the batch in tokens (e.g. 393216)"
        )
    return step * tokens_per_step
