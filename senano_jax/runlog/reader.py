"""Reads any log that can be compared: a run folder of ours, a text log, a CSV of points, a published run."""

import csv
import dataclasses
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.runlog.batch_plan import BatchPlan
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.log_lines import Line, PointCollector, read_lines
from senano_jax.runlog.published import PUBLISHED, record_history
from senano_jax.runlog.run_folder import read_run_folder
from senano_jax.runlog.torch_log import read_torch_log

PUBLISHED_PREFIX = "published:"


def read_log(source: str | Path, *, tokens_per_step: int | None = None) -> RunLog:
    """The one run that `source` names. Raises UserError as `read_logs` does, and for a file of several runs."""
    runs = read_logs(source, tokens_per_step=tokens_per_step)
    if len(runs) > 1:
        raise UserError(f"{source}: {len(runs)} runs in one file; keep the lines of one run only")
    return runs[0]


def read_logs(
    source: str | Path, *, tokens_per_step: int | None = None, batch: BatchPlan | None = None
) -> list[RunLog]:
    """The runs that `source` names, at least one; `tokens_per_step` and, of this log alone, `batch` are for text logs
    that do not count tokens.

    A folder is one of our runs (so are its metrics.jsonl and log.txt); `published:NAME` is a curve that comes with
    this package; NAME.csv has columns `tokens,val_loss` and, if known, `step` and `train_time_ms`; all else is a
    text log, such as PyTorch programs write. Raises UserError, naming file, line and reason, for what is missing or
    damaged.
    """
    text = str(source)
    if text.startswith(PUBLISHED_PREFIX):
        _refuse_batch(text, batch)
        return [_read_published(text.removeprefix(PUBLISHED_PREFIX))]
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path; give a run folder, a PyTorch log or published:NAME")
    path = expand_home(text)
    try:
        if path.name in ("metrics.jsonl", "log.txt") and (path.parent / "config.json").is_file():
            path = path.parent
        is_folder = path.is_dir()
    except OSError as error:
        raise UserError(f"{text[:200]}: cannot be read ({error.strerror})") from None
    if is_folder:
        _refuse_batch(text, batch)
        return [read_run_folder(path)]
    if path.suffix == ".csv":
        _refuse_batch(text, batch)
        return _read_csv(path)
    return read_torch_log(path, path.stem, tokens_per_step, batch)


def _refuse_batch(text: str, batch: BatchPlan | None) -> None:
    if batch is not None:
        raise UserError(f"{text} counts its tokens itself; leave out the @ behind its name")


def _read_published(name: str) -> RunLog:
    published = PUBLISHED.get(name)
    if published is None:
        is_record = name in {record.name for record in record_history()}
        reason = "has no curve here, only the token count that --records marks" if is_record else "is not known"
        raise UserError(f"published:{name} {reason}; choose from {', '.join(f'published:{n}' for n in PUBLISHED)}")
    (run,) = read_torch_log(published.path, f"published {name}", published.tokens_per_step)
    return dataclasses.replace(
        run,
        parameters=published.parameters,
        tokens_read=published.tokens_read,
        hardware=published.hardware,
        validation=published.validation,
    )


def _read_csv(path: Path) -> list[RunLog]:
    """Curves known only as points, such as one read off a figure; they count as complete. Each line that names the
    columns begins one."""
    collectors, columns = [], None
    for line in read_lines(path):
        cells = _cells(line)
        if columns in (None, cells):
            columns = cells
            if not {"tokens", "val_loss"} <= set(columns):
                line.damaged(
                    "the first line must name the columns tokens and val_loss (step and train_time_ms if known)"
                )
            collectors.append(PointCollector(path))
        elif cells:
            _add_csv_point(collectors[-1], line, dict(zip(columns, cells)))
    return [_csv_log(path, collector) for collector in collectors or [PointCollector(path)]]


def _csv_log(path: Path, collector: PointCollector) -> RunLog:
    points = collector.evaluations()
    return RunLog(
        name=path.stem,
        implementation="CSV",
        group_key=f"file {path.resolve()}",
        points=points,
        train_points=(),
        tokens_trained=points[-1].tokens if points else 0,
        tokens_read=None,
        complete=not collector.diverged,
        steps_total=points[-1].step if points else None,
        diverged=collector.diverged,
    )


def _cells(line: Line) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line.text], strict=True), [])]
    except csv.Error:
        line.damaged("not a line of comma-separated values")


def _add_csv_point(collector: PointCollector, line: Line, row: dict[str, str]) -> None:
    collector.add_validation(
        line,
        step=line.count_of("step", row["step"]) if row.get("step") else None,
        tokens=line.count_of("tokens", row.get("tokens", "")),
        loss=row.get("val_loss", ""),
        time=line.number_of("train_time_ms", row["train_time_ms"]) if row.get("train_time_ms") else None,
    )
