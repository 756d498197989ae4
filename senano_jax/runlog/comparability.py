"""Whether two groups of runs can be compared at all: on one validation text, and on schedules of like lengths."""

from collections.abc import Sequence

from senano_jax.runlog.curves import RunLog, tokens_to_loss
from senano_jax.runlog.units import format_tokens

_SAME_LENGTH = 1.01
_LIKE_LENGTH = 1.5  # between schedules, of which the shorter one is what a record saves
_NEARLY_DONE = 0.9  # of a schedule: the learning rate is low


def other_validation(first: Sequence[RunLog], runs: Sequence[RunLog]) -> str | None:
    """What some of `runs` are validated on that others, or some of `first`, are not; None if nothing is known to."""
    for other in (*first, *runs):
        for run in runs:
            if run.validation and other.validation and (found := other.validation.difference(run.validation)):
                return found
    return None


def other_schedule(first: Sequence[RunLog], runs: Sequence[RunLog], target: float) -> tuple[str | None, bool]:
    """How the lengths of the schedules differ, and whether that forbids to say what is saved: a run that comes down to
    the target early in a long schedule would come down sooner in a short one."""
    lengths = [[run.planned_tokens for run in side if run.planned_tokens] for side in (first, runs)]
    if not all(lengths):
        return None, False
    ratio = max(map(max, lengths)) / min(map(min, lengths))
    if ratio <= _SAME_LENGTH:
        return None, False
    words = f"a schedule of {_range(lengths[1])} tokens, not {_range(lengths[0])}"
    shares = [
        reached / run.planned_tokens
        for run in (*first, *runs)
        if run.planned_tokens and (reached := tokens_to_loss(run.points, target)) is not None
    ]
    if ratio > _LIKE_LENGTH and shares and min(shares) < _NEARLY_DONE:
        return f"{words}, and {target:g} came after {min(shares):.0%} of one of them", True
    return words, False


def _range(lengths: Sequence[float]) -> str:
    ends = [format_tokens(end) for end in (min(lengths), max(lengths))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
