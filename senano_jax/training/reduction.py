"""The sum of the devices' gradients: all of it on every device, or of the matrices a share on each."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from senano_jax.model.build import Params
from senano_jax.optim.groups import parameter_group
from senano_jax.optim.shares import Shares, Stacks
from senano_jax.training.mesh import DATA_AXIS


class Reduced(NamedTuple):
    """Of gradients, float32."""

    gradients: Params  # of all devices; of matrices in `stacks` only this device's own, good for their shapes
    stacks: Stacks | None  # this device's share of the matrices' gradients, if the devices share them
    norm: Float[Array, ""]  # over all parameters


def reduced(gradients: Params, shares: Shares | None = None, dtype: DTypeLike = jnp.float32) -> Reduced:
    """Adds the devices' float32 gradients up, within a function mapped over DATA_AXIS. `dtype` is the type that they
    are rounded to on the way: with bfloat16 half as many bytes travel."""

    def add(tree):
        return _cast(jax.lax.psum(_cast(tree, dtype), DATA_AXIS), jnp.float32)

    if shares is None:
        gradients = add(gradients)
        return Reduced(gradients, None, optax.tree.norm(gradients))
    matrices, others = _split(gradients)
    others = add(others)
    stacks = _cast(shares.reduce_scatter(_cast(matrices, dtype)), jnp.float32)
    square = jax.lax.psum(optax.tree.norm(stacks, squared=True), DATA_AXIS) + optax.tree.norm(others, squared=True)
    all_leaves = jax.tree.map(lambda g, other: g if isinstance(other, optax.MaskedNode) else other, gradients, others)
    return Reduced(all_leaves, stacks, jnp.sqrt(square))


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _split(gradients: Params) -> tuple[Any, Any]:
    """The tree with the matrices alone, and that with the others, MaskedNode in place of what is left out."""

    def keep(wanted, path, g):
        return g if (parameter_group(path) == "matrices") == wanted else optax.MaskedNode()

    return tuple(jax.tree.map_with_path(functools.partial(keep, wanted), gradients) for wanted in (True, False))
