"""What a comparison draws of each group, and the ranges of its axes."""

from collections.abc import Sequence
from dataclasses import dataclass

from senano_jax.runlog.comparability import other_validation
from senano_jax.runlog.comparison import Group, complete_runs
from senano_jax.runlog.curves import ValidationPoint, difference_curve, mean_curve, tokens_to_loss
from senano_jax.runlog.units import format_tokens

HOURS, MINUTES = 3_600_000, 60_000  # milliseconds
_EARLY = 0.15  # part of a run whose losses, of several nats, do not stretch the axis


@dataclass(frozen=True)
class Series:
    """What is drawn of one group."""

    name: str
    curve: list[ValidationPoint]
    """Mean over the seeds."""
    seeds: list[list[ValidationPoint]]
    """The single runs, where there are several."""
    difference: list[tuple[int, float]]
    """(tokens, loss - the first group's mean loss); none for the first group itself, nor for losses on other text."""
    seed_differences: list[list[tuple[int, float]]]
    """The same of the single runs."""
    tokens_to_target: float | None
    """Mean over the seeds; None unless all reached it."""
    verdict: str
    """The same in words."""


def series_of(groups: Sequence[Group], target: float) -> list[Series]:
    """What to draw, a series a group, in order."""
    base, series = None, []
    first = complete_runs(groups[0])
    for group in groups:
        runs = complete_runs(group)
        compared = other_validation(first, runs) is None
        curve = mean_curve(runs)
        seeds = [[point for point in run.points if point.tokens > 0] for run in runs] if len(runs) > 1 else []
        difference = difference_curve(curve, base) if base is not None and compared else []
        base = curve if base is None else base
        seed_differences = [difference_curve(seed, base) for seed in seeds if compared]
        reached = [tokens for run in runs if (tokens := tokens_to_loss(run.points, target)) is not None]
        diverged = any(run.diverged for run in runs)
        to_target = None if diverged or len(reached) < len(runs) else sum(reached) / len(reached)
        verdict = _verdict(diverged, len(reached), len(runs)) if to_target is None else format_tokens(to_target)
        series.append(Series(group.name, curve, seeds, difference, seed_differences, to_target, verdict))
    return series


def _verdict(diverged: bool, reached: int, of: int) -> str:
    if diverged:
        return "diverged"
    return f"reached by {reached} of {of}" if reached else "not reached"


def loss_range(series: Sequence[Series], target: float) -> tuple[float, float, bool]:
    """(lowest, highest, whether the target is among them) for the loss axis.

    The first steps of a run and a target far from all curves would flatten what there is to see.
    """
    late = [p.val_loss for s in series for p in s.curve if p.tokens >= _EARLY * s.curve[-1].tokens]
    low, high = (min(late), max(late)) if late else (target, target)
    span = max(high - low, 0.02)
    shown = low - span / 2 <= target <= high + span / 2
    if shown:
        low, high = min(low, target), max(high, target)
    return low - 0.05 * span, high + 0.05 * span, shown


def difference_range(series: Sequence[Series]) -> tuple[float, float]:
    """(lowest, highest) for the axis of the differences, scaled like the loss axis by what comes after the start."""
    drawn = [differences for one in series for differences in (one.difference, *one.seed_differences) if differences]
    late = [d for differences in drawn for tokens, d in differences if tokens >= _EARLY * differences[-1][0]]
    low, high = min(0, *late, 0), max(0, *late, 0)
    margin = 0.12 * max(high - low, 0.002)
    return low - margin, high + margin


def time_unit(series: Sequence[Series]) -> tuple[str, float]:
    """The unit of the time axis, by the longest run, and its milliseconds."""
    longest = max((point.train_time_ms or 0 for s in series for point in s.curve), default=0)
    return ("hours", HOURS) if longest > 3 * HOURS else ("minutes", MINUTES)
