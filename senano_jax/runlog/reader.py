"""Reads any log that can be compared: a run folder of ours, a PyTorch log, a CSV of points, a published run."""

import csv
import dataclasses
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.runlog.curves import RunLog, ValidationPoint
from senano_jax.runlog.log_lines import Line, PointCollector, read_lines
from senano_jax.runlog.published import PUBLISHED
from senano_jax.runlog.run_folder import read_run_folder
from senano_jax.runlog.torch_log import read_torch_log

PUBLISHED_PREFIX = "published:"


def read_log(source: str | Path, *, tokens_per_step: int | None = None) -> RunLog:
    """The run that `source` names; `tokens_per_step` is for PyTorch logs that do not count tokens.

    A folder is one of our runs (so are its metrics.jsonl and log.txt); `published:NAME` is a curve that comes with
    this package; NAME.csv has columns `tokens,val_loss` and, if known, `step` and `train_time_ms`; all else is a
    PyTorch log. Raises UserError, naming file, line and reason, for what is missing or damaged.
    """
    text = str(source)
    if text.startswith(PUBLISHED_PREFIX):
        return _read_published(text.removeprefix(PUBLISHED_PREFIX))
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path; give a run folder, a PyTorch log or published:NAME")
    path = Path(text)
    try:
        if path.name in ("metrics.jsonl", "log.txt") and (path.parent / "config.json").is_file():
            path = path.parent
        is_folder = path.is_dir()
    except OSError as error:
        raise UserError(f"{text[:200]}: cannot be read ({error.strerror})") from None
    if is_folder:
        return read_run_folder(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    return read_torch_log(path, path.stem, tokens_per_step)


def _read_published(name: str) -> RunLog:
    published = PUBLISHED.get(name)
    if published is None:
        raise UserError(f"published:{name} is not known; choose from {', '.join(f'published:{n}' for n in PUBLISHED)}")
    return dataclasses.replace(
        read_torch_log(published.path, f"published {name}", None),
        parameters=published.parameters,
        tokens_read=published.tokens_read,
        hardware=published.hardware,
    )


def _read_csv(path: Path) -> RunLog:
    """A curve known only as points, such as one read off a figure; it counts as complete."""
    collector, columns = PointCollector(path), None
    for line in read_lines(path):
        cells = _cells(line)
        if columns is None:
            columns = cells
            if not {"tokens", "val_loss"} <= set(columns):
                line.damaged(
                    "the first line must name the columns tokens and val_loss (step and train_time_ms if known)"
                )
        elif cells:
            collector.add_validation(line, _csv_point(line, dict(zip(columns, cells))))
    points = collector.evaluations()
    return RunLog(
        name=path.stem,
        implementation="CSV",
        group_key=f"file {path.resolve()}",
        points=points,
        train_points=(),
        tokens_trained=points[-1].tokens,
        tokens_read=None,
        complete=True,
        steps_total=points[-1].step,
    )


def _cells(line: Line) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line.text], strict=True), [])]
    except csv.Error:
        line.damaged("not a line of comma-separated values")


def _csv_point(line: Line, row: dict[str, str]) -> ValidationPoint:
    return ValidationPoint(
        step=line.count_of("step", row["step"]) if row.get("step") else None,
        tokens=line.count_of("tokens", row.get("tokens", "")),
        val_loss=line.number_of("val_loss", row.get("val_loss", "")),
        train_time_ms=line.number_of("train_time_ms", row["train_time_ms"]) if row.get("train_time_ms") else None,
    )
