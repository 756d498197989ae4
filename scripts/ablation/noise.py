"""How far a figure may be off by chance."""

import math
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Noise:
    """A standard deviation that was estimated, and its degrees of freedom."""

    sd: float
    df: int

    def half_width(self, n: float) -> float:
        """Half of the 95% interval (Student's t) of a figure whose variance is the n-th part of sd^2."""
        return float(student_t.ppf(0.975, self.df)) * self.sd / math.sqrt(n)
