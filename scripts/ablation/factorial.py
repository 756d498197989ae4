"""Factors, tried together: a design in which each is on in half of the runs, and what each one does to the loss.

An effect is the mean loss with a factor less that without it, over all settings of the others. All runs take part in
it, so that its error is that of the difference of two means, each over half of the runs: 16 runs tell as much about
each of 8 factors as 8 pairs of runs would about one. How much a factor's effect depends on the others is in the spread
that is left over, and so in the intervals.

The design is two-level and fractional, of resolution IV (Box & Hunter, Technometrics 3, 1961): once all runs are
finished, what two factors do together is not taken for what a third one does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from senano_jax.errors import UserError

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
    sd: float | None
    """Spread of a single run around what the effects add up to; None if no run is left over to tell."""
    df: int
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


def combinations(factors: Mapping[str, Mapping[str, Any]], where: str) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """For each run of the design the differences that its factors make, and these factors. `factors` has the table of
    each, as a study gives it. Raises UserError, which begins with `where`, if two factors set a field."""
    found = []
    for row in design(len(factors)):
        names, table = tuple(name for name, is_on in zip(factors, row) if is_on), {}
        for name in names:
            own = {key: value for key, value in factors[name].items() if key != "name"}
            table = merged(table, nested(own, f"{where}, factor {name!r}"), f"{where}, factor {name!r}")
        found.append((table, names))
    return found


def nested(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with keys such as "optimizer.schedule.floor" taken apart, as TOML does where they have no quotes.
    Raises UserError, which begins with `where`, if it sets a field in both forms."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        first, _, rest = key.partition(".")
        value = nested({rest: value} if rest else value, where) if rest or isinstance(value, dict) else value
        found = merged(found, {first: value}, where)
    return found


def merged(table: Mapping[str, Any], added: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The differences of both nested tables. Raises UserError, which begins with `where`, if both set a field."""
    both = dict(table)
    for key, value in added.items():
        if key not in both:
            both[key] = value
        elif all(isinstance(side, dict) and "kind" not in side for side in (value, both[key])):
            both[key] = merged(both[key], value, where, f"{prefix}{key}.")
        else:
            raise UserError(f"{where}: {prefix}{key} is set twice; give each factor fields of its own")
    return both


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
    levels = [
        [0.5 if factor in own else -0.5 for factor in told] + [float(seed == one) for one in begun]
        for own, seed, _ in runs
    ]
    matrix = np.array(levels, np.float64).reshape(len(runs), len(told) + len(begun))
    if not told or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return Effects((), len(runs), total, None, 0, None)
    inverse = np.linalg.inv(matrix.T @ matrix)
    target = np.array([loss for *_, loss in runs])
    found = inverse @ (matrix.T @ target)
    df = len(runs) - matrix.shape[1]
    sd = math.sqrt(((target - matrix @ found) ** 2).sum() / df) if df else None
    by_factor = []
    for factor in factors:
        difference = half_width = None
        if factor in told:
            n = told.index(factor)
            difference = float(found[n])
            half_width = None if sd is None else float(student_t.ppf(0.975, df) * sd * math.sqrt(inverse[n, n]))
        by_factor.append(Effect(factor, difference, half_width))
    gains = [one.factor for one in by_factor if one.is_gain]
    half = sum((0.5 if factor in gains else -0.5) * found[n] for n, factor in enumerate(told))
    with_gains = float(found[len(told) :].mean() + half) if gains else None
    return Effects(tuple(by_factor), len(runs), total, sd, df, with_gains)
