"""From the head's products to logits: under a soft-cap, or as they are.

Each is a value with the same four functions, of which the loss asks for what it needs.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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

    def logits(self, z: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Of single products, float32."""
        z = z.astype(jnp.float32)
        return self.height * jax.nn.sigmoid((z + self.shift if self.shift else z) / self.divisor)

    def all_logits(self, z_NV: Float[Array, "N V"]) -> Float[Array, "N V"]:
        """Of whole rows of products: all columns are in the softmax."""
        return self.logits(z_NV)

    def logsumexp(self, logits_NV: Float[Array, "N V"]) -> Float[Array, "N"]:
        """Over the columns of logits, float32."""
        # Logits lie in (0, height), so exp cannot overflow and the usual pass for the maximum is spared.
        return jnp.log(jnp.exp(logits_NV).sum(-1))

    def pulled_back(self, d_logits: Float[Array, "*S"], logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """The gradient of z: that of the logits times their derivative by z."""
        return d_logits * (logits * (1 - logits / self.height) / self.divisor)

    def check(self, flag: str) -> None:
        """Raises UserError at the first value that cannot work; `flag` is what precedes the names of the fields."""
        if not 0 < self.height <= HIGHEST:
            raise UserError(f"{flag}.height is {self.height}; use a number above 0 and at most {HIGHEST:g}")
        if not 0 < self.divisor < float("inf"):
            raise UserError(f"{flag}.divisor is {self.divisor}; use a number above 0")
        if not abs(self.shift) < float("inf"):
            raise UserError(f"{flag}.shift is {self.shift}; use a finite number")


@dataclass(frozen=True)
class Plain:
    """The products are the logits; the first `vocab_size` of a row are in the softmax."""

    vocab_size: int

    def logits(self, z: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """The products as float32."""
        return z.astype(jnp.float32)

    def all_logits(self, z_NV: Float[Array, "N V"]) -> Float[Array, "N V"]:
        """-inf beyond the vocabulary."""
        return jnp.where(jnp.arange(z_NV.shape[1]) < self.vocab_size, self.logits(z_NV), -jnp.inf)

    def logsumexp(self, logits_NV: Float[Array, "N V"]) -> Float[Array, "N"]:
        """Over the columns of logits, float32."""
        return jax.nn.logsumexp(logits_NV, axis=-1)

    def pulled_back(self, d_logits: Float[Array, "*S"], logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """The gradient of z: that of the logits."""
        return d_logits
