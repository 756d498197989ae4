"""Factors, tried together: a design in which each is on in half of the runs, and what each one does to the loss.

An effect is the mean loss with a factor less that without it, over all settings of the others. All runs take part in
it, so that its error is that of the difference of two means, each over half of the runs: 16 runs tell as much about
each of 8 factors as 8 pairs of runs would about one. How much a factor's effect depends on the others is in the spread
that is left over, and so in the intervals.

The design is two-level and fractional, of resolution IV (Box & Hunter, Technometrics 3, 1961): once all runs are
finished, what two factors do together is not taken for what a third one does.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ablation.noise import Noise

FEWEST_FACTORS, MOST_FACTORS = 3, 16


@dataclass(frozen=True)
class Effect:
    """What one factor does to the loss."""

    factor: str
    difference: float | None
    """Mean loss with it less that without it; None as long as all finished runs have it, or none has."""
    half_width: float | None
    """Half of the 95% interval; None if no run is left over to tell."""

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.half_width is not None and self.difference < -self.half_width


@dataclass(frozen=True)
class Effects:
    by_factor: tuple[Effect, ...]
    """In the order of the study; empty as long as the finished runs do not tell the factors apart."""
    finished: int
    runs: int
    noise: Noise | None
    """Spread of a single run around what the effects add up to; None if no run is left over to tell."""
    with_gains: float | None
    """The loss that the effects add up to with all gains on and all else off, over the seeds; None without a gain."""


def design(factors: int) -> list[tuple[bool, ...]]:
    """Which factors are on in each run: twice as many runs as factors, rounded up to a power of two. The first run has
    none.

    The numbers of the runs have as many digits, in base two, as it takes. A factor is on where an odd number of its
    own digits are 1; of these it has one, or three, or another odd number. Where one of two factors is on, but not
    both, an odd number of digits are 1 out of an even number of them: these are no third factor's.
    """
    digits = 1 + (factors - 1).bit_length()
    masks = sorted((m for m in range(1, 2**digits) if m.bit_count() % 2), key=lambda m: (m.bit_count(), m))[:factors]
    return [tuple((run & mask).bit_count() % 2 == 1 for mask in masks) for run in range(2**digits)]


def effects(
    factors: Sequence[str],
    on: Mapping[str, Sequence[str]],
    losses: Mapping[str, Mapping[int, float]],
    seeds: Sequence[int],
) -> Effects:
    """By least squares over the finished runs, with a mean of its own for each seed.

    `on` has the factors of each variant of the design, `losses` the final loss of each variant by seed.
    """
    runs = [(set(on[variant]), seed, losses[variant][seed]) for variant in on for seed in losses.get(variant, {})]
    total = len(on) * len(seeds)
    told = [factor for factor in factors if len({factor in own for own, *_ in runs}) == 2]
    begun = [seed for seed in seeds if any(seed == own for _, own, _ in runs)]

    def levels(own: Collection[str], weights: Sequence[float]) -> list[float]:
        return [0.5 if factor in own else -0.5 for factor in told] + list(weights)

    matrix = np.array([levels(own, [float(seed == one) for one in begun]) for own, seed, _ in runs])
    if not told or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return Effects((), len(runs), total, None, None)
    inverse = np.linalg.inv(matrix.T @ matrix)
    target = np.array([loss for *_, loss in runs])
    found = inverse @ (matrix.T @ target)
    df = len(runs) - matrix.shape[1]
    noise = Noise(math.sqrt(((target - matrix @ found) ** 2).sum() / df), df) if df else None
    of_told = {
        factor: Effect(factor, float(difference), noise and noise.half_width(1 / variance))
        for factor, difference, variance in zip(told, found, inverse.diagonal())
    }
    by_factor = tuple(of_told.get(factor, Effect(factor, None, None)) for factor in factors)
    gains = [one.factor for one in by_factor if one.is_gain]
    with_gains = float(found @ levels(gains, [1 / len(begun)] * len(begun))) if gains else None
    return Effects(by_factor, len(runs), total, noise, with_gains)
