"""What a log says about a run: its points, and the loss and token count interpolated between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from senano_jax.runlog.validation import Validation

SAME_TOKENS = 1e-3  # counts closer than this part are one: PyTorch logs round to 0.01M tokens


class ValidationPoint(NamedTuple):
    """One evaluation."""

    step: int | None  # updates done; None where the log does not count steps
    tokens: int  # tokens trained on so far
    val_loss: float  # mean cross-entropy in nats a token
    train_time_ms: float | None  # training clock, stopped during evaluation


class TrainPoint(NamedTuple):
    """One training step."""

    step: int  # 1 is the first update
    tokens: int | None  # tokens trained on, this step included
    loss: float | None  # mean over the step's tokens, before the update
    train_time_ms: float | None  # training clock after the step
    tokens_read: int | None = None  # tokens of the stream passed, this step and any thrown away included


@dataclass(frozen=True)
class RunLog:
    """One run, whoever wrote its log. Points are in the order of the run; there is at least one, unless it diverged."""

    name: str
    implementation: str
    """"senano_jax", "PyTorch", "llm.c" or "CSV"."""
    group_key: str
    """Equal for runs that differ only in the seed and in where they were written."""
    points: tuple[ValidationPoint, ...]
    train_points: tuple[TrainPoint, ...]
    tokens_trained: int
    tokens_read: int | None
    """More than `tokens_trained` for a loader that throws tokens away; None if the log does not say."""
    complete: bool
    """Whether the last planned step was evaluated."""
    steps_total: int | None = None
    parameters: int | None = None
    seed: int | None = None
    hardware: str | None = None
    diverged: str | None = None
    """Where its loss stopped being a number for good, such as "step 500"; `points` are those before."""
    validation: Validation | None = None
    """What it was validated on; None if the log does not say."""
    planned_tokens: float | None = None
    """The length of its schedule; None if the log does not say."""
    notes: tuple[str, ...] = ()
    """What the reader passed over, for the user to know."""

    @property
    def final(self) -> ValidationPoint | None:
        """The last evaluation; None for a run that diverged before its first one."""
        return self.points[-1] if self.points else None


def tokens_to_loss(points: Sequence[ValidationPoint], target: float) -> float | None:
    """Tokens trained on when the validation loss first falls to `target`; None if it never does.

    Between two evaluations the loss is taken as linear in the logarithm of the tokens (as linear in the tokens where
    the earlier evaluation was made before training). Two evaluations at one token count, which a log that rounds its
    tokens can have, give that count.
    """
    for index, after in enumerate(points):
        if after.val_loss > target:
            continue
        if index == 0:
            return float(after.tokens)
        before = points[index - 1]
        fraction = (before.val_loss - target) / (before.val_loss - after.val_loss)
        if before.tokens == 0:
            return fraction * after.tokens
        return before.tokens * (after.tokens / before.tokens) ** fraction
    return None


def loss_at(points: Sequence[ValidationPoint], tokens: float) -> float | None:
    """Validation loss after `tokens`, linear in log tokens between evaluations; None outside of the run.

    Before the first evaluation that follows training nothing is known well enough: the loss falls by several nats.
    """
    trained = [point for point in points if point.tokens > 0]
    if not trained:
        return None
    first, last = trained[0], trained[-1]
    if not first.tokens * (1 - SAME_TOKENS) <= tokens <= last.tokens * (1 + SAME_TOKENS):
        return None
    tokens = min(max(tokens, first.tokens), last.tokens)
    for before, after in pairwise(trained):
        if tokens <= after.tokens and before.tokens < after.tokens:
            fraction = math.log(tokens / before.tokens) / math.log(after.tokens / before.tokens)
            return before.val_loss + fraction * (after.val_loss - before.val_loss)
    return trained[-1].val_loss


def time_at(points: Sequence[ValidationPoint], tokens: float) -> float | None:
    """Training clock in milliseconds after `tokens`, linear between evaluations; None where the log does not say."""
    for before, after in pairwise(points):
        if before.tokens <= tokens <= after.tokens and before.tokens < after.tokens:
            if before.train_time_ms is None or after.train_time_ms is None:
                return None
            fraction = (tokens - before.tokens) / (after.tokens - before.tokens)
            return before.train_time_ms + fraction * (after.train_time_ms - before.train_time_ms)
    return next((point.train_time_ms for point in points if point.tokens == tokens), None)


def mean_curve(runs: Sequence[RunLog]) -> list[ValidationPoint]:
    """The mean over seeds at every token count of an evaluation that lies within all runs; none before training.

    Evaluations of several runs at counts that are one but for rounding make one point, at the largest count.
    """
    counts = sorted({point.tokens for run in runs for point in run.points if point.tokens > 0})
    evaluated = [{point.tokens for point in run.points} for run in runs]
    curve = []
    for tokens, following in zip(counts, [*counts[1:], math.inf]):
        own = any(tokens in those and following in those for those in evaluated)  # two evaluations of one run
        if following <= tokens * (1 + SAME_TOKENS) and not own:
            continue
        losses, times = zip(*(_loss_and_time(run.points, tokens) for run in runs))
        if None not in losses:
            time = None if None in times else math.fsum(times) / len(times)
            curve.append(ValidationPoint(None, tokens, math.fsum(losses) / len(losses), time))
    return curve


def _loss_and_time(points: Sequence[ValidationPoint], tokens: int) -> tuple[float | None, float | None]:
    """Those of the evaluation at this count, if there is one, else interpolated."""
    nearest = min(points, key=lambda point: abs(point.tokens - tokens), default=None)
    if nearest and abs(nearest.tokens - tokens) <= SAME_TOKENS * tokens:
        return nearest.val_loss, nearest.train_time_ms
    return loss_at(points, tokens), time_at(points, tokens)


def difference_curve(points: Sequence[ValidationPoint], base: Sequence[ValidationPoint]) -> list[tuple[int, float]]:
    """(tokens, loss - base's loss) within both runs, at base's evaluations and the last one of `points`.

    Negative where `points` is ahead. Where the two were evaluated at different token counts, a chord stands for a
    curve: on the published record, with every other evaluation removed, that is wrong by 0.01 nats, and by 0.07 at
    its start.
    """
    counts = {point.tokens for point in base} | {point.tokens for point in points[-1:]}
    pairs = [(tokens, loss_at(points, tokens), loss_at(base, tokens)) for tokens in sorted(counts) if tokens > 0]
    return [(tokens, loss - other) for tokens, loss, other in pairs if loss is not None and other is not None]
