"""Student's t for a handful of seeds: interval of a mean, test against a target, Welch's test between two groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit  # scipy.stats has them too, and takes a second to import


@dataclass(frozen=True)
class Sample:
    """Mean and spread of one figure over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        """Summary of at least one value."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, None, 1)
        return cls(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)

    def half_width(self, level: float = 0.95) -> float | None:
        """Half of the two-sided confidence interval of the mean; None for a single value."""
        if self.sd is None:
            return None
        return float(stdtrit(self.n - 1, (1 + level) / 2)) * self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class WelchTest:
    """Difference of two means without assuming equal variances."""

    difference: float
    half_width: float
    """Half of its 95% confidence interval."""
    p: float
    """Two-sided p-value of no difference."""
    df: float


def p_mean_below(sample: Sample, target: float) -> float | None:
    """One-sided p-value of the one-sample t-test: how easily a true mean >= `target` would look this low.

    None where the test is undefined: a single value, or values without any spread.
    """
    if not sample.sd:
        return None
    return float(stdtr(sample.n - 1, (sample.mean - target) * math.sqrt(sample.n) / sample.sd))


def welch_test(first: Sample, second: Sample) -> WelchTest | None:
    """Welch's test of `second` - `first`; None where undefined: a single value, or no spread in both."""
    if first.sd is None or second.sd is None or not first.sd + second.sd:
        return None
    variance_1, variance_2 = first.sd**2 / first.n, second.sd**2 / second.n
    variance = variance_1 + variance_2
    df = variance**2 / (variance_1**2 / (first.n - 1) + variance_2**2 / (second.n - 1))
    difference, error = second.mean - first.mean, math.sqrt(variance)
    p = 2 * float(stdtr(df, -abs(difference) / error))
    return WelchTest(difference, float(stdtrit(df, 0.975)) * error, p, df)
