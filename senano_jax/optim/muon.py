"""Muon: momentum, then orthogonalisation, for the matrices inside a network.

Differs from `optax.contrib.muon`: momentum follows a schedule, the averages are not bias-corrected, the iteration runs
in bfloat16, and matrices of one shape are orthogonalised as one stack, which several devices can share.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from senano_jax.optim.newton_schulz import orthogonalize


class MuonState(NamedTuple):
    count: Int[Array, ""]  # steps taken
    momentum: optax.Updates  # moving average of the gradients, like the parameters


def scale_by_muon(momentum: Callable[[Array], Array], axis_name: str | None = None) -> optax.GradientTransformation:
    """Turns gradients of matrices [..., in, out] into orthogonal steps of unit learning rate.

        m <- mu m + (1 - mu) g
        d  = (1 - mu) g + mu m                       (Nesterov)
        u  = sqrt(max(1, out / in)) orthogonalize(d)  (float32)

    Leading axes hold separate matrices, each orthogonalised by itself.

    Args:
      momentum: mu as a function of the step.
      axis_name: a mapped axis whose devices hold equal gradients and share the orthogonalisation: each does its part
        of every stack that divides evenly, and all gather the results. None: every device does all of it.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params
        mu = momentum(state.count)
        average = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, gradients)
        direction = jax.tree.map(lambda m, g: (1 - mu) * g + mu * m, average, gradients)
        leaves, structure = jax.tree.flatten(direction)
        updates = _orthogonalize_by_shape(leaves, axis_name)
        return jax.tree.unflatten(structure, updates), MuonState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(leaves: list[Array], axis_name: str | None) -> list[Array]:
    """Orthogonalises every matrix of every leaf, all matrices of one shape (up to transposition) in one stack."""
    wide = [leaf.mT if leaf.shape[-2] > leaf.shape[-1] else leaf for leaf in leaves]
    updates: list[Array | None] = [None] * len(leaves)
    for shape in dict.fromkeys(leaf.shape[-2:] for leaf in wide):
        members = [i for i, leaf in enumerate(wide) if leaf.shape[-2:] == shape]
        stacks = [wide[i].reshape(-1, *shape) for i in members]
        done = _orthogonalize_shared(jnp.concatenate(stacks), axis_name)
        start = 0
        for i, stack in zip(members, stacks):
            part = done[start : start + len(stack)].reshape(wide[i].shape)
            start += len(stack)
            fan_in, fan_out = leaves[i].shape[-2:]
            part = part.mT if fan_in > fan_out else part
            updates[i] = max(1, fan_out / fan_in) ** 0.5 * part.astype(jnp.float32)
    return updates


def _orthogonalize_shared(stack: Float[Array, "n rows cols"], axis_name: str | None) -> Float[Array, "n rows cols"]:
    """One stack, split over the devices of `axis_name` if it divides evenly."""
    if axis_name is None or len(stack) % jax.lax.axis_size(axis_name):
        return orthogonalize(stack)
    size = len(stack) // jax.lax.axis_size(axis_name)
    mine = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(axis_name) * size, size)
    return jax.lax.all_gather(orthogonalize(mine), axis_name, tiled=True)
