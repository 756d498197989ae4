"""Muon on several devices each of which keeps the averages of its own matrices alone: stage 1 of ZeRO (Rajbhandari et
al., 2019, arXiv 1910.02054), by whole matrices, because an orthogonal step needs all of one.

`scale_by_muon` has every average on every device. Here the gradients of all devices are added up where they are needed
(a reduce-scatter in place of an all-reduce), momentum and whatever a rule keeps stay there, and only the orthogonal
steps travel, in the iteration's bfloat16. A state of either form can be made from the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from senano_jax.optim.cuts import cut, joined
from senano_jax.optim.muon import MuonState, StackedMuonState, nesterov, step_factor
from senano_jax.optim.stacks import Stack, StackRule, filled_up, init_stacks, stacked, unstacked

Stacks = dict[str, Stack]  # by the shape of their matrices


class SharedMuonState(NamedTuple):
    """The first axis of every array but `count` goes over the devices; zeros fill the last share up."""

    count: Int[Array, ""]  # steps taken
    momentum: Stacks  # moving averages of the gradients, float32
    stacks: dict[str, Any]  # what the rule keeps of each stack


@dataclass(frozen=True)
class Shares:
    """How matrices are dealt out to the devices of a mapped axis."""

    axis_name: str
    devices: int
    query_key_columns: int | None
    """Columns into which queries and keys are cut (see `cut`)."""

    def stacks(self, tree: Any) -> Stacks:
        """All matrices of a tree of parameters, in stacks that every device has an equal share of."""
        return {name: filled_up(stack, self.devices) for name, stack in stacked(self._matrices(tree)).items()}

    def tree(self, stacks: Stacks, like: Any) -> Any:
        """The matrices again as a tree of parameters; of `like` only the shapes are used."""
        like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)  # compiled away
        parts = [cut(path, leaf, self.query_key_columns) for path, leaf in jax.tree.leaves_with_path(like)]
        of_parts = iter(unstacked(stacks, [matrix for part in parts for matrix in part]))
        return jax.tree.unflatten(jax.tree.structure(like), [joined([next(of_parts) for _ in part]) for part in parts])

    def reduce_scatter(self, tree: Any) -> Stacks:
        """This device's share of the stacks, summed over the devices, of which each has a tree of its own."""
        return {
            name: jax.lax.psum_scatter(stack, self.axis_name, tiled=True) for name, stack in self.stacks(tree).items()
        }

    def to_shared(self, opt_state: Any) -> Any:
        """An optimiser's state with every state of `scale_by_muon` in the form that is shared."""

        def spread(node):
            if not isinstance(node, MuonState | StackedMuonState):
                return node
            kept = node.stacks if isinstance(node, StackedMuonState) else {}
            kept = jax.tree.map(lambda x: filled_up(x, self.devices), kept)
            return SharedMuonState(node.count, self.stacks(node.momentum), kept)

        return jax.tree.map(spread, opt_state, is_leaf=lambda x: isinstance(x, MuonState | StackedMuonState))

    def to_replicated(self, opt_state: Any, like: Any) -> Any:
        """The state that `to_shared` made this one of; `like` has its structure and shapes."""

        def whole(node, as_it_was):
            if not isinstance(node, SharedMuonState):
                return node
            momentum = self.tree(node.momentum, as_it_was.momentum)
            if isinstance(as_it_was, MuonState):
                return MuonState(node.count, momentum)
            kept = jax.tree.map(lambda x, wanted: x[: len(wanted)], node.stacks, as_it_was.stacks)
            return StackedMuonState(node.count, momentum, kept)

        return jax.tree.map(whole, opt_state, like, is_leaf=lambda x: isinstance(x, SharedMuonState))

    def _matrices(self, tree: Any) -> list[Float[Array, "*stack in out"]]:
        return [m for path, leaf in jax.tree.leaves_with_path(tree) for m in cut(path, leaf, self.query_key_columns)]


def scale_by_shared_muon(
    momentum: Callable[[Array], Array], rule: StackRule, shares: Shares, down_rate: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_muon` of gradients that every device has a share of: the keyword argument `stacks` of `update`, as
    `Shares.reduce_scatter` makes them. Of the gradients proper only the shapes are used. The updates are whole, on
    every device."""

    def init(params):
        stacks = shares.stacks(params)
        average = optax.tree.zeros_like(stacks, dtype=jnp.float32)
        return SharedMuonState(jnp.zeros((), jnp.int32), average, init_stacks(rule, list(stacks.values())))

    def update(gradients, state, params=None, *, stacks: Stacks, **_):
        del params
        direction, average = nesterov(stacks, state.momentum, momentum(state.count))
        steps, kept = {}, dict(state.stacks)
        for name, stack in direction.items():
            step, tree = rule.update(stack, state.stacks.get(name, ()))
            steps[name] = jax.lax.all_gather(step, shares.axis_name, tiled=True)
            if name in kept:
                kept[name] = tree
        updates = jax.tree.map_with_path(
            lambda path, u: step_factor(path, u.shape, down_rate) * u.astype(jnp.float32),
            shares.tree(steps, gradients),
        )
        return updates, SharedMuonState(state.count + 1, average, kept)

    return optax.GradientTransformationExtraArgs(init, update)
