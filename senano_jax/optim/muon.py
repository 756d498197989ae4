"""Muon: momentum, then orthogonalisation, for the matrices inside a network.

Differs from `optax.contrib.muon`: momentum follows a schedule, the averages are not bias-corrected, the iteration runs
in bfloat16, and matrices of one shape are orthogonalised as one stack, which several devices can share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from senano_jax.optim.cuts import cut, joined, name_of
from senano_jax.optim.newton_schulz import Iteration, orthogonalize
from senano_jax.optim.stacks import StackRule, init_stacks, update_stacks


class MuonState(NamedTuple):
    """Of a rule that keeps nothing of its stacks."""

    count: Int[Array, ""]  # steps taken
    momentum: optax.Updates  # moving averages of the gradients, float32


class StackedMuonState(NamedTuple):
    """Of a rule that keeps something of its stacks."""

    count: Int[Array, ""]
    momentum: optax.Updates
    stacks: dict[str, Any]  # see init_stacks


def orthogonalized(iteration: Iteration, dtype: DTypeLike = jnp.bfloat16) -> StackRule:
    """Orthogonalises every matrix and keeps nothing."""
    return StackRule(lambda stack: (), lambda stack, kept: (orthogonalize(stack, iteration, dtype), kept))


def scale_by_muon(
    momentum: Callable[[Array], Array],
    rule: StackRule,
    axis_name: str | None = None,
    query_key_columns: int | None = None,
    down_rate: float = 1.0,
) -> optax.GradientTransformation:
    """Turns gradients of matrices [..., in, out] into orthogonal steps of unit learning rate.

        m <- mu m + (1 - mu) g
        d  = (1 - mu) g + mu m                    (Nesterov)
        u  = factor rule(d)                       (float32; factor: sqrt(max(1, out / in)), see step_factor)

    Leading axes hold separate matrices, each orthogonalised by itself.

    Args:
      momentum: mu as a function of the step.
      rule: what orthogonalises the matrices.
      axis_name: a mapped axis whose devices hold equal gradients and share the orthogonalisation (see stacks.py).
      query_key_columns: columns of a matrix into which queries and keys are cut (see `cut`).
      down_rate: multiplies u of the parameters called `down`.
    """

    def init(params):
        state = MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=jnp.float32))
        stacks = init_stacks(rule, [m for part in _matrices(params) for m in part])
        return StackedMuonState(*state, stacks) if stacks else state

    def update(gradients, state, params=None):
        del params
        direction, average = nesterov(gradients, state.momentum, momentum(state.count))
        parts = _matrices(direction)
        stacks = state.stacks if isinstance(state, StackedMuonState) else {}
        orthogonal, stacks = update_stacks(rule, [m for part in parts for m in part], stacks, axis_name)
        of_parts = iter(orthogonal)
        updates = jax.tree.unflatten(
            jax.tree.structure(direction), [joined([next(of_parts) for _ in part]) for part in parts]
        )
        updates = jax.tree.map_with_path(
            lambda path, u: step_factor(path, u.shape, down_rate) * u.astype(jnp.float32), updates
        )
        state = MuonState(state.count + 1, average)
        return updates, StackedMuonState(*state, stacks) if stacks else state

    def _matrices(tree) -> list[list[Array]]:
        return [cut(path, leaf, query_key_columns) for path, leaf in jax.tree.leaves_with_path(tree)]

    return optax.GradientTransformation(init, update)


def nesterov(gradients: optax.Updates, average: optax.Updates, mu: Array) -> tuple[optax.Updates, optax.Updates]:
    """The direction d and the new average m, as in `scale_by_muon`."""
    average = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, average, gradients)
    direction = jax.tree.map(lambda m, g: (1 - mu) * g + mu * m, average, gradients)
    return direction, average


def step_factor(path: tuple, shape: tuple[int, ...], down_rate: float) -> float:
    """How much farther than an orthogonal matrix the step of a parameter [..., in, out] goes."""
    fan_in, fan_out = shape[-2:]
    return max(1, fan_out / fan_in) ** 0.5 * (down_rate if name_of(path) == "down" else 1.0)
