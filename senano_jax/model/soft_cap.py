"""What the configuration says of the soft-cap on the logits; its functions are in cap.py."""

import dataclasses
from dataclasses import dataclass

from senano_jax.errors import UserError

HIGHEST = 75.0  # exp of it, summed over a vocabulary, is a float32


@dataclass(frozen=True)
class SoftCap:
    """logits = height * sigmoid((z + shift) / divisor), z = x @ head (Gemma 2's soft-cap, arXiv 2408.00118: 15 tanh(u)
    + 15 = 30 sigmoid(2u))."""

    height: float = 30.0
    """Logits lie between 0 and this."""
    divisor: float = 7.5
    """The head's products are divided by this before the sigmoid."""
    shift: float = 0.0
    """Added to the products before the division."""
    by_width: bool = True
    """Divide by the square root of model.dim too."""

    def at_width(self, dim: int) -> "SoftCap":
        """The same function for products of `dim` terms, with no width left in it."""
        if not self.by_width:
            return self
        return dataclasses.replace(self, divisor=self.divisor * dim**0.5, by_width=False)

    def check(self, flag: str) -> None:
        """Raises UserError at the first value that cannot work; `flag` is what precedes the names of the fields."""
        if not 0 < self.height <= HIGHEST:
            raise UserError(f"{flag}.height is {self.height}; use a number above 0 and at most {HIGHEST:g}")
        if not 0 < self.divisor < float("inf"):
            raise UserError(f"{flag}.divisor is {self.divisor}; use a number above 0")
        if not abs(self.shift) < float("inf"):
            raise UserError(f"{flag}.shift is {self.shift}; use a finite number")
