"""From the head's products to logits: under a soft-cap, or as they are.

Each is a value with the same four functions, of which the loss asks for what it needs.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.model.soft_cap import SoftCap


@dataclass(frozen=True)
class Capped(SoftCap):
    """The functions of a `SoftCap` that has no width left in it."""

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


def capped(cap: SoftCap, dim: int) -> Capped:
    """The functions of `cap` for products of `dim` terms."""
    return Capped(**dataclasses.asdict(cap.at_width(dim)))


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
