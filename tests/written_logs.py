"""Logs that were written, not trained, evaluated after every step."""

import json
from pathlib import Path


def torch_log(path: Path, *losses: float, total: int | None = None) -> str:
    """A log that is evaluated after every step of a million tokens; returns its path."""
    total = total or len(losses)
    lines = [
        f"step:{step}/{total} val_loss:{loss} train_time:{step}00ms step_avg:100.00ms tokens:{step}.00M\n"
        for step, loss in enumerate(losses, start=1)
    ]
    path.write_text("".join(lines))
    return str(path)


def run_folder(path: Path, *losses: float, **config) -> str:
    """One of our runs, evaluated after every step of a million tokens; returns its path."""
    path.mkdir()
    settings = {"preset": "tiny", "steps": len(losses), "seed": 0, "model": {"dim": 64}, "parameters": 1000}
    (path / "config.json").write_text(json.dumps(settings | config))
    records = [
        {"step": step, "tokens_trained": step * 10**6, "val_loss": loss, "train_time_ms": step * 50.0}
        for step, loss in enumerate(losses, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def steps_log(path: Path, *losses: float, total: int | None = None) -> str:
    """A log that does not count tokens, evaluated after every step; returns its path."""
    total = total or len(losses)
    lines = [
        f"step:{step}/{total} val_loss:{loss} train_time:{step}00ms\n" for step, loss in enumerate(losses, start=1)
    ]
    path.write_text("".join(lines))
    return str(path)
