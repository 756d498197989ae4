"""Where the work on matrices is done: all of one shape in one stack, which several devices can share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Stack = Float[Array, "n rows cols"]  # rows <= cols


class StackRule(NamedTuple):
    """What is done to a stack, to each of its matrices by itself."""

    init: Callable[[Stack], Any]  # stack -> what the rule keeps from step to step, a tree of arrays [n, ...]
    update: Callable[[Stack, Any], tuple[Stack, Any]]  # (stack, kept) -> both anew; any number of the n matrices


def init_stacks(rule: StackRule, matrices: list[Float[Array, "*stack in out"]]) -> dict[str, Any]:
    """What the rule keeps of each stack, by the shape of its matrices, such as "768x3072"; no entry if it keeps
    nothing."""
    kept = {name: rule.init(stack) for name, stack in stacked(matrices).items()}
    return {name: tree for name, tree in kept.items() if jax.tree.leaves(tree)}


def update_stacks(
    rule: StackRule, matrices: list[Float[Array, "*stack in out"]], kept: dict[str, Any], axis_name: str | None
) -> tuple[list[Float[Array, "*stack in out"]], dict[str, Any]]:
    """Applies `rule` to every matrix: those of one shape (up to transposition) in one stack.

    Everything is the same on all devices of `axis_name`, before and after: each does its part of every stack, and all
    gather the results. None: every device does all of it.
    """
    done, new = {}, dict(kept)
    for name, stack in stacked(matrices).items():
        done[name], tree = _divided(rule, stack, kept.get(name, ()), axis_name)
        if name in kept:
            new[name] = tree
    return unstacked(done, matrices), new


def stacked(matrices: list[Float[Array, "*stack in out"]]) -> dict[str, Stack]:
    """All matrices of a shape (up to transposition) in one stack, by their shape."""
    wide = _wide(matrices)
    return {
        _name(shape): jnp.concatenate([wide[i].reshape(-1, *shape) for i in members])
        for shape, members in _members(wide)
    }


def unstacked(
    stacks: dict[str, Stack], like: list[Float[Array, "*stack in out"]]
) -> list[Float[Array, "*stack in out"]]:
    """The matrices that `stacked` put there, in the shapes of `like`; a stack may have more behind them."""
    wide = _wide(like)
    results: list[Array | None] = [None] * len(like)
    for shape, members in _members(wide):
        stack, start = stacks[_name(shape)], 0
        for i in members:
            size = wide[i].size // (shape[0] * shape[1])
            part = stack[start : start + size].reshape(wide[i].shape)
            start += size
            results[i] = part.mT if like[i].shape[-2] > like[i].shape[-1] else part
    return results


def filled_up(x: Float[Array, "n ..."], devices: int) -> Float[Array, "filled ..."]:
    """Zeros behind its rows, so that each device has equally many."""
    missing = -len(x) % devices
    return jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])


def _wide(matrices: list[Array]) -> list[Array]:
    """No more rows than columns: the smaller of the two Gram matrices is that of the rows."""
    return [matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix for matrix in matrices]


def _members(wide: list[Array]):
    """Yields each shape (rows, cols) and the indices of its arrays."""
    for shape in dict.fromkeys(array.shape[-2:] for array in wide):
        yield shape, [i for i, array in enumerate(wide) if array.shape[-2:] == shape]


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _divided(rule: StackRule, stack: Stack, kept: Any, axis_name: str | None) -> tuple[Stack, Any]:
    """One stack, split over the devices of `axis_name`; where it does not divide, zeros fill the last share up."""
    if axis_name is None:
        return rule.update(stack, kept)
    count, devices = len(stack), jax.lax.axis_size(axis_name)
    size = -(-count // devices)
    start = jax.lax.axis_index(axis_name) * size

    def mine(x):
        return jax.lax.dynamic_slice_in_dim(filled_up(x, devices), start, size)

    done = rule.update(*jax.tree.map(mine, (stack, kept)))
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True)[:count], done)
