"""What the folder of one run says: whether it is finished, how far it is, how fast it was."""

import json
import statistics
from pathlib import Path
from typing import Any

from ablation.study import Job
from senano_jax.config import settings
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.log_lines import read_lines
from senano_jax.runlog.reader import read_log

FIRST_STEPS = 10  # not timed, or half of a shorter run: compilation, and memory that grows


def failure_file(root: Path, job: Job) -> Path:
    return root / f"{job.name}.failed"


def failure(root: Path, job: Job) -> str | None:
    """Why the run failed; None if it did not."""
    try:
        return failure_file(root, job).read_text(errors="replace").strip()
    except OSError:
        return None


def has_begun(root: Path, job: Job) -> bool:
    """Whether the run's folder can be resumed. Raises UserError if it holds the run of another configuration."""
    file = root / job.name / "config.json"
    if not file.exists():
        return False
    was, told = settings(read_config(file)[0]), settings(job.config)
    for name in {**was, **told}:
        if was.get(name) != told.get(name):
            raise UserError(
                f"{file} is of a run with {name} {was.get(name)}, the study says {told.get(name)}; "
                "give the variant another name, or move the folder away"
            )
    return True


def finished_run(root: Path, job: Job) -> RunLog | None:
    """The run if it is complete, else None. Raises UserError as `has_begun` does."""
    if not has_begun(root, job):
        return None
    try:
        run = read_log(root / job.name)
    except UserError:  # nothing evaluated yet, or a line cut in two, which it drops when it goes on
        if _has_ended(root / job.name, job.config.steps):
            raise  # damaged since
        return None
    return run if run.complete else None


def _has_ended(folder: Path, steps: int) -> bool:
    """Whether a line of metrics.jsonl is the evaluation after the last step."""
    return any(record["step"] == steps and "val_loss" in record for record in _records(folder))


def step_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about training steps; none if there is no such file."""
    return [record for record in _records(folder) if "loss" in record]


def _records(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "metrics.jsonl").exists():
        return []
    records = []
    for line in read_lines(folder / "metrics.jsonl"):
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError):  # being written
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def median_speed(folder: Path) -> float | None:
    """Tokens a second of a step, the first ones left out; None if the folder does not say."""
    speeds = [record["tokens_per_s"] for record in step_records(folder) if "tokens_per_s" in record]
    return statistics.median(speeds[min(FIRST_STEPS, len(speeds) // 2) :]) if speeds else None
