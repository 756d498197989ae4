"""Muon: momentum, then orthogonalisation, for the matrices inside a network.

Differs from `optax.contrib.muon`: momentum follows a schedule, the averages are not bias-corrected, the iteration runs
in bfloat16, and matrices of one shape are orthogonalised as one stack, which several devices can share.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from senano_jax.optim.newton_schulz import Iteration, orthogonalize
from senano_jax.optim.stacks import StackRule, update_stacks


class MuonState(NamedTuple):
    count: Int[Array, ""]  # steps taken
    momentum: optax.Updates  # moving average of the gradients, like the parameters


def scale_by_muon(
    momentum: Callable[[Array], Array], iteration: Iteration, axis_name: str | None = None
) -> optax.GradientTransformation:
    """Turns gradients of matrices [..., in, out] into orthogonal steps of unit learning rate.

        m <- mu m + (1 - mu) g
        d  = (1 - mu) g + mu m                       (Nesterov)
        u  = sqrt(max(1, out / in)) orthogonalize(d)  (float32)

    Leading axes hold separate matrices, each orthogonalised by itself.

    Args:
      momentum: mu as a function of the step.
      iteration: how matrices are orthogonalised.
      axis_name: a mapped axis whose devices hold equal gradients and share the orthogonalisation (see stacks.py).
    """
    rule = StackRule(lambda stack: (), lambda stack, kept: (orthogonalize(stack, iteration), kept))

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params
        mu = momentum(state.count)
        average = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, gradients)
        direction = jax.tree.map(lambda m, g: (1 - mu) * g + mu * m, average, gradients)
        leaves, structure = jax.tree.flatten(direction)
        orthogonal, _ = update_stacks(rule, leaves, {}, axis_name)
        updates = [aspect(u.shape[-2:]) * u.astype(jnp.float32) for u in orthogonal]
        return jax.tree.unflatten(structure, updates), MuonState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def aspect(shape: tuple[int, int]) -> float:
    """How much farther a matrix (in, out) with more outputs than inputs moves."""
    fan_in, fan_out = shape
    return max(1, fan_out / fan_in) ** 0.5
