"""One run as it is drawn by itself: its training losses, what they amount to, and its evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from senano_jax.runlog.curves import RunLog, ValidationPoint
from senano_jax.runlog.run_folder import read_run_folder

_EARLY = 0.02  # part of a long run whose losses, of several nats, do not stretch the axis
_LONG = 200  # steps
_DRAWN = 2000  # points of a line; more of them than an image has columns show nothing more

Point = tuple[int, float]
"""Tokens trained on, and the loss in nats a token."""


@dataclass(frozen=True)
class RunCurve:
    """What the picture of one run shows. Losses are in nats a token."""

    title: str
    run: RunLog
    training: list[Point]
    """The losses of steps, before their updates."""
    smoothed: list[Point]
    """Means over the steps around: two on each side, or a hundredth of the run where that is more."""
    evaluations: tuple[ValidationPoint, ...]
    lowest: float
    highest: float


def run_curve(folder: Path) -> RunCurve | None:
    """The curve of a run folder; None if it has neither trained nor evaluated. Raises UserError for a damaged one."""
    run = read_run_folder(folder, evaluated=False)
    training = [(point.tokens, point.loss) for point in run.train_points if point.loss is not None]
    if not training and not run.points:
        return None
    smoothed = _smooth(training)
    losses = [*smoothed, *((point.tokens, point.val_loss) for point in run.points)]
    early = _EARLY * max(tokens for tokens, _ in losses) if len(training) > _LONG else 0
    late = [loss for tokens, loss in losses if tokens >= early]
    margin = 0.05 * max(max(late) - min(late), 0.02)
    title = f"{run.name}, {folder.resolve().name}" if run.name != folder.resolve().name else run.name
    lowest, highest = min(late) - margin, max(late) + margin
    return RunCurve(title, run, _thin(training), _thin(smoothed), run.points, lowest, highest)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over the steps around each. Fewer of them at the start, where the loss falls fast; at the end those
    before."""
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    smooth = []
    for index, (tokens, _) in enumerate(points):
        reach = min(index // 4, max(2, len(points) // 100))
        begin, end = index - reach, min(len(points), index + reach + 1)
        smooth.append((tokens, (sums[end] - sums[begin]) / (end - begin)))
    return smooth


def _thin(points: list[Point]) -> list[Point]:
    """Every k-th point, and the last."""
    every = math.ceil(len(points) / _DRAWN)
    return points[:-1:every] + points[-1:] if every > 1 else points
