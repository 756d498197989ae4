"""Student's t for a handful of seeds: interval of a mean, test against a target, Welch's test between two groups.

SciPy would be a large dependency for four functions. The distribution function needs one special function, the
regularised incomplete beta I_x(a, b), which a continued fraction gives to about 1e-13.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_TINY = 1e-300  # keeps Lentz's recurrence from dividing by zero


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
        return student_t_quantile((1 + level) / 2, self.n - 1) * self.sd / math.sqrt(self.n)


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
    return student_t_cdf((sample.mean - target) * math.sqrt(sample.n) / sample.sd, sample.n - 1)


def welch_test(first: Sample, second: Sample) -> WelchTest | None:
    """Welch's test of `second` - `first`; None where undefined: a single value, or no spread in both."""
    if first.sd is None or second.sd is None or not first.sd + second.sd:
        return None
    variance_1, variance_2 = first.sd**2 / first.n, second.sd**2 / second.n
    variance = variance_1 + variance_2
    df = variance**2 / (variance_1**2 / (first.n - 1) + variance_2**2 / (second.n - 1))
    difference, error = second.mean - first.mean, math.sqrt(variance)
    p = 2 * student_t_cdf(-abs(difference) / error, df)
    return WelchTest(difference, student_t_quantile(0.975, df) * error, p, df)


def student_t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with `df` > 0 degrees of freedom, accurate in the far tails too.

    P(T > |t|) = I_x(df/2, 1/2) / 2 with x = df / (df + t^2): the tail itself, not 1 minus the bulk.
    """
    tail = _incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t)) / 2
    return tail if t < 0 else 1 - tail


def student_t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1."""
    if p < 0.5:
        return -student_t_quantile(1 - p, df)
    high = 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:  # until the two are neighbouring floats
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b) for `complement` = 1 - x, which the caller knows without cancellation."""
    if x <= 0 or complement <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side of the mode
        return 1 - _incomplete_beta(b, a, complement, x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(complement)
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1/(1+ d1/(1+ d2/(1+ ...))) of the incomplete beta, by Lentz's method.

    d_2m = m(b-m)x / ((a+2m-1)(a+2m)),  d_2m+1 = -(a+m)(a+b+m)x / ((a+2m)(a+2m+1))   (Abramowitz & Stegun 26.5.8)
    """
    value, numerator, denominator = 1.0, 1.0, 0.0
    for index in range(1, 1_000_000):
        m, odd = divmod(index, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / ((1 + d * denominator) or _TINY)
        numerator = (1 + d / numerator) or _TINY
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            break
    return 1 / value
