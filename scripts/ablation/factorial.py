"""Factors, tried together: a design in which each is on in half of the runs, and what each one does to the loss.

An effect is the difference between the mean losses with and without a factor. All runs take part in it, so that its
error is that of a mean over half of them: 16 runs tell as much about each of 8 factors as 8 pairs of runs would about
one. How much a factor's effect depends on the others is in the spread that is left over.

The design is two-level and fractional, of resolution IV (Box & Hunter, Technometrics 3, 1961): what two factors do
together is never taken for what another one does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from senano_jax.errors import UserError

MOST_FACTORS = 16


@dataclass(frozen=True)
class Effect:
    """Of one factor."""

    factor: str
    difference: float
    """Mean loss with it less that without it, over all settings of the others."""
    half_width: float | None
    """Half of the 95% interval; None if no run is left over to tell."""


@dataclass(frozen=True)
class Effects:
    of: tuple[Effect, ...]
    """In the order of the study; empty as long as the finished runs do not tell the factors apart."""
    finished: int
    runs: int
    sd: float | None
    """Spread of a single run around what the effects add up to; None if no run is left over to tell."""
    df: int


def design(factors: int) -> list[tuple[bool, ...]]:
    """Which factors are on in each run, the first of which has none: twice as many runs as factors, and up to a power
    of two.

    The numbers of the runs have as many digits, in base two, as it takes. A factor is on where an odd number of its
    own digits, of which it has one or three or another odd number, are 1. So no factor is another one, or what two
    others do together.
    """
    digits = 1 + max(factors - 1, 0).bit_length()
    masks = sorted((m for m in range(1, 2**digits) if m.bit_count() % 2), key=lambda m: (m.bit_count(), m))[:factors]
    return [tuple((run & mask).bit_count() % 2 == 1 for mask in masks) for run in range(2**digits)]


def merged(table: Mapping[str, Any], added: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The differences of both tables of a study. Raises UserError, which begins with `where`, if both set a field."""
    both = dict(table)
    for key, value in added.items():
        if key not in both:
            both[key] = value
        elif all(isinstance(side, dict) and "kind" not in side for side in (value, both[key])):
            both[key] = merged(both[key], value, where, f"{prefix}{key}.")
        else:
            raise UserError(f"{where}: another factor sets {prefix}{key}, too; give each factor fields of its own")
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
    begun = [seed for seed in seeds if any(seed == own for _, own, _ in runs)]
    levels = [
        [0.5 if factor in own else -0.5 for factor in factors] + [float(seed == one) for one in begun]
        for own, seed, _ in runs
    ]
    matrix = np.array(levels, np.float64).reshape(len(runs), len(factors) + len(begun))
    total = len(on) * len(seeds)
    if not runs or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return Effects((), len(runs), total, None, 0)
    inverse = np.linalg.inv(matrix.T @ matrix)
    target = np.array([loss for *_, loss in runs])
    found = inverse @ (matrix.T @ target)
    df = len(runs) - matrix.shape[1]
    sd = math.sqrt(((target - matrix @ found) ** 2).sum() / df) if df else None
    width = [
        None if sd is None else student_t.ppf(0.975, df) * sd * math.sqrt(inverse[n, n]) for n in range(len(found))
    ]
    of = (Effect(factor, float(found[n]), width[n]) for n, factor in enumerate(factors))
    return Effects(tuple(of), len(runs), total, sd, df)
