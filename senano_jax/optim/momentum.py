"""The direction that Muon makes orthogonal: averages of the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from senano_jax.optim.config import Mixture


class Momentum(NamedTuple):
    """What makes a direction of gradients: two functions, like those of an optax transformation."""

    init: Callable[[optax.Params], Any]  # parameters -> averages, float32
    update: Callable[[optax.Updates, Any, Array], tuple[optax.Updates, Any]]
    """(gradients, averages, step) -> direction, averages"""


def nesterov(mu: Callable[[Array], Array]) -> Momentum:
    """m <- mu m + (1 - mu) g, in the direction (1 - mu) g + mu m; mu is a function of the step."""

    def update(gradients, average, step):
        rate = mu(step)
        average = jax.tree.map(lambda m, g: rate * m + (1 - rate) * g, average, gradients)
        direction = jax.tree.map(lambda m, g: (1 - rate) * g + rate * m, average, gradients)
        return direction, average

    return Momentum(_zeros, update)


def mixed(mu: Callable[[Array], Array], mixture: Mixture, steps: int) -> Momentum:
    """Two averages, f and s: up to the step that is `start` of the run both as `nesterov`, then

        f <- fast f + (1 - fast) g
        s <- slow s + (1 - slow) g
        direction (1 - mu) g + mu (share f + (1 - share) s)

    Bi-Maxwell momentum: modded-nanogpt, pull request 340.
    """
    last_plain, share = round(mixture.start * steps), mixture.share

    def update(gradients, averages, step):
        rate = mu(step)

        def average(old, own):
            b = jnp.where(step <= last_plain, rate, own)
            return jax.tree.map(lambda m, g: b * m + (1 - b) * g, old, gradients)

        fast, slow = average(averages[0], mixture.fast), average(averages[1], mixture.slow)
        direction = jax.tree.map(
            lambda f, s, g: (1 - rate) * g + rate * (share * f + (1 - share) * s), fast, slow, gradients
        )
        return direction, (fast, slow)

    return Momentum(lambda params: (_zeros(params), _zeros(params)), update)


def _zeros(params: optax.Params) -> optax.Params:
    return optax.tree.zeros_like(params, dtype=jnp.float32)
