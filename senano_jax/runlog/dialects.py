"""The lines in which programs that train GPTs log, one function a kind of line.

step:125/1700 val_loss:4.6851 train_time:515188ms step_avg:4121.50ms tokens:49.15M    modded-nanogpt and its descendants
4900/20000 val_loss: 2.3306 val_bpb: 1.0649                                           parameter-golf
s:250 tel:6.3097                                                                      llm.c
step 250: train loss 1.5440, val loss 1.7220                                          nanoGPT
Step 00250 | Val BPB: 1.0123 | Val Loss: 3.3513                                       slowrun, nanochat

Each function takes a line without colours and gives what it says, or None for a line of another kind. Whatever stands
before the step is passed over: a rank, a time stamp, a progress bar. Each raises UserError for a line of its kind that
cannot be read.
"""

import re
from typing import NamedTuple

from senano_jax.runlog.log_lines import Line, is_not_finite

KNOWN = "`step:N/M val_loss:X`, `N/M val_loss: X`, llm.c's `s:N tel:X`, nanoGPT's `step N: train loss .., val loss X`, "
KNOWN += "`Step N | Val Loss: X`"
_UNITS_MS = {"ms": 1, "s": 1000}
_UNITS_TOKENS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_INCOMPLETE = "not a complete step line"


class Record(NamedTuple):
    """What a line says. Losses are as they are spelt; which of them is there tells what kind of line it is."""

    text: str  # from the step on, or the last part
    step: int | None  # updates done; None for an evaluation that does not say when
    total: int | None = None  # updates planned
    val_loss: str | None = None
    train_loss: str | None = None
    time_ms: float | None = None  # training clock
    tokens: int | None = None  # trained on so far
    stopped: bool = False  # the program ends the run at this step, before `total`
    in_bytes: bool = False  # the evaluation is in bits a byte, not in nats a token
    by: str = "PyTorch"


_STEP_OF = re.compile(r"(?<![A-Za-z_-])step: ?([0-9]{1,15})/([0-9]{1,15})(?![\w/.])", re.ASCII)
_STEP = re.compile(r"(?<![A-Za-z_-])step: ?([0-9]{1,15})(?![\w/.])", re.ASCII)
_FIELD = re.compile(r"(?<![\w/])(val_loss|train_loss|train_time|tokens): ?([^\s,;|]+)", re.ASCII)
_BROKEN_OFF = re.compile(r"(?<=\s)val_(l|lo|los|loss|loss:)?\Z")
_FIGURE = re.compile(r"[-+]?([0-9]|nan\b|inf)", re.IGNORECASE)
_TIME = re.compile(r"([^\s:]+?)(ms|s)")
_TOKENS = re.compile(r"([^\s:KMBG]+)([KMBG]?)")


def step_line(line: Line) -> Record | None:
    """`step:N/M` or `step:N`, and fields in any order, of which those that are not known are passed over."""
    match = _STEP_OF.search(line.text) or _STEP.search(line.text)
    if match is None:
        return None
    text, step, total = line.text[match.start() :], line.count_of("step", match[1]), None
    if match.re is _STEP_OF:
        total = line.count_of("total", match[2])
        if "stopping_early" in line.text[: match.start()]:
            return Record(text, step, total, stopped=True)
    if _BROKEN_OFF.search(text.rstrip()):
        line.damaged(_INCOMPLETE)
    before, fields = (_first_of_each(part) for part in (line.text[: match.start()], text))
    if "val_loss" in before and "val_loss" not in fields:
        fields = before | fields
    if not {"val_loss", "train_loss", "train_time"} & set(fields):
        return None
    if any(":" in fields.get(name, "") for name in ("val_loss", "train_loss")):
        line.damaged(_INCOMPLETE)
    time, tokens = _TIME.fullmatch(fields.get("train_time", "0s")), _TOKENS.fullmatch(fields.get("tokens", "0"))
    if not time or not tokens:
        line.damaged(_INCOMPLETE)
    time_ms = line.number_of("train_time_ms", time[1]) * _UNITS_MS[time[2]]
    count = round(line.number_of("tokens", tokens[1]) * _UNITS_TOKENS[tokens[2]])
    return Record(
        text,
        step,
        total,
        val_loss=fields.get("val_loss"),
        train_loss=fields.get("train_loss"),
        time_ms=time_ms if "train_time" in fields else None,
        tokens=count if "tokens" in fields else None,
    )


def _first_of_each(text: str) -> dict[str, str]:
    """The known fields in `text`."""
    return dict(reversed(_FIELD.findall(text)))


def line_without_step(line: Line) -> Record | None:
    """An evaluation after training, say of rounded weights, whose step goes without saying. One with the time of a step
    has a damaged step."""
    fields = _first_of_each(line.text)
    if not _FIGURE.match(fields.get("val_loss", "")):
        return None
    if "train_time" in fields:
        line.damaged(_INCOMPLETE)
    return Record(line.text, None, val_loss=fields["val_loss"])


_COUNTED = re.compile(r"(?:^|[\s|\]])([0-9]{1,15})/([0-9]{1,15}) (val|train)_loss: ?([^\s,;|]+)", re.ASCII)
_CLOCK = re.compile(r"train_time: ([0-9.]+)m(?!\w)")


def counted_line(line: Line) -> Record | None:
    """`N/M val_loss: X`; minutes on the lines of training only."""
    match = _COUNTED.search(line.text)
    if not match:
        return None
    step, total = line.count_of("step", match[1]), line.count_of("total", match[2])
    losses = {f"{match[3]}_loss": match[4]}
    clock = _CLOCK.search(line.text, match.end())
    time = line.number_of("train_time_ms", clock[1]) * 60_000 if clock else None
    return Record(line.text[match.start(1) :], step, total, time_ms=time, **losses)


_LLMC = re.compile(r"(?<![A-Za-z_])s:([0-9]{1,15}) (tel|trl):(\S+)", re.ASCII)


def llmc_line(line: Line) -> Record | None:
    """`s:N tel:X`, an evaluation after N updates, or `s:N trl:X`, the loss before update N + 1."""
    match = _LLMC.search(line.text)
    if not match:
        return None
    step = line.count_of("step", match[1])
    if match[2] == "tel":
        return Record(line.text[match.start() :], step, val_loss=match[3], by="llm.c")
    return Record(line.text[match.start() :], step + 1, train_loss=match[3], by="llm.c")


_NANOGPT = re.compile(
    r"(?<![A-Za-z_])step ([0-9]{1,15}): train loss [^\s,]+, val loss ([^\s,]+)", re.ASCII | re.IGNORECASE
)
_NANOGPT_ITERATION = re.compile(r"(?<![A-Za-z_])iter ([0-9]{1,15}): loss ([^\s,]+)", re.ASCII)


def nanogpt_line(line: Line) -> Record | None:
    """`step N: train loss .., val loss X`, an evaluation after N updates, or `iter N: loss X` before update N + 1."""
    if match := _NANOGPT.search(line.text):
        return Record(line.text[match.start() :], line.count_of("step", match[1]), val_loss=match[2])
    if match := _NANOGPT_ITERATION.search(line.text):
        return Record(line.text[match.start() :], line.count_of("step", match[1]) + 1, train_loss=match[2])
    return None


_BARRED_STEP = re.compile(
    r"(?<![A-Za-z_])step ([0-9]{1,15})(?:/([0-9]{1,15}))?(?: \([0-9.]{1,9}%\))? ?\|", re.ASCII | re.IGNORECASE
)
_BARRED_LOSS = re.compile(r"(Val(?:idation)? loss|Val(?:idation)? bpb|loss): (\S+)", re.ASCII | re.IGNORECASE)


def barred_line(line: Line) -> Record | None:
    """`Step N | Val Loss: X`, an evaluation after N updates, or `step N | loss: X` before update N + 1."""
    match = _BARRED_STEP.search(line.text)
    cells = line.text[match.end() :].split("|", 20) if match else []
    found = {m[1].lower(): m[2] for cell in cells if (m := _BARRED_LOSS.fullmatch(cell.strip()))}
    if not found:
        return None
    step, total = line.count_of("step", match[1]), line.count_of("total", match[2]) if match[2] else None
    losses = [loss for name, loss in found.items() if name.startswith("val") and name.endswith("loss")]
    if losses:
        return Record(cells[-1].strip(), step, total, val_loss=losses[0])
    if "loss" in found:
        return Record(cells[-1].strip(), step + 1, total, train_loss=found["loss"])
    return Record(cells[-1].strip(), step, total, in_bytes=True)


def read_record(line: Line) -> Record | None:
    """What a line says to the first function that knows it."""
    if ":" not in line.text:
        return None
    for read in (step_line, counted_line, llmc_line, nanogpt_line, barred_line, line_without_step):
        if record := read(line):
            for name, loss in (("val_loss", record.val_loss), ("loss", record.train_loss)):
                if loss is not None and not is_not_finite(loss):
                    line.number_of(name, loss)
            return record
    return None


_BATCH = re.compile(
    r"(?:tokens per iteration will be: ?|Total batch size |\btotal_batch_size=|\btrain_batch_tokens[:=] ?)"
    r"([0-9][0-9,]{0,15})(?![\w.])",
    re.ASCII,
)
_RAMP = re.compile(r"\bbatch_switch:|\bbatch_tokens_start=[1-9]")


def tokens_of_a_step(text: str) -> int | None:
    """The batch that a program announces before it trains; 0 if it says that the batch will grow, None if nothing."""
    if "batch" not in text and "tokens per" not in text:
        return None
    if _RAMP.search(text):
        return 0
    match = _BATCH.search(text)
    return int(match[1].replace(",", "")) if match else None
