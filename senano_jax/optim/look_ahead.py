"""Gradients taken ahead of the weights, along the way that they have gone (EMA-Nesterov, arXiv 2605.25395)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from senano_jax.optim.average import AverageState
from senano_jax.optim.config import Cooldown, LookAhead, WarmupCosine
from senano_jax.optim.schedules import learning_rate_factor


class LookAheadState(NamedTuple):
    """The way that the weights have gone, and the state of the optimiser that moves them."""

    count: Int[Array, ""]  # steps taken
    distance: Float[Array, ""]  # k of the next step
    direction: optax.Params  # l, moving average of the steps, float32
    inner: optax.OptState


def with_look_ahead(
    optimizer: optax.GradientTransformation, settings: LookAhead, schedule: Cooldown | WarmupCosine, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Steps of `optimizer` from x + k l, given the gradient there:

        y = x + k l
        x <- y + optimizer(gradient at y)
        l <- decay l + (1 - decay) (x - x before)

    k is `distance` times the factor of the learning rates in the step before, from `start` to `end` of the run, else 0.
    The gradient must have been taken at `look_ahead(state, x)`; x are the weights to evaluate.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    first, end = round(settings.start * steps), round(settings.end * steps)

    def distance(step):
        factor = learning_rate_factor(jnp.maximum(step - 1, 0), steps, schedule)
        return jnp.where((first <= step) & (step < end), settings.distance * factor, 0.0)

    def init(params):
        direction = optax.tree.zeros_like(params, dtype=jnp.float32)
        count = jnp.zeros((), jnp.int32)
        return LookAheadState(count, distance(count), direction, optimizer.init(params))

    def update(gradients, state, params, *, rate=None, **arguments):
        ahead = _moved(params, state)
        updates, inner = optimizer.update(gradients, state.inner, ahead, rate=rate, **arguments)
        updates = jax.tree.map(
            lambda u, y, x: u + (y.astype(jnp.float32) - x.astype(jnp.float32)), updates, ahead, params
        )
        new = optax.apply_updates(params, updates)
        direction = jax.tree.map(
            lambda l, w, x: settings.decay * l + (1 - settings.decay) * (w.astype(jnp.float32) - x.astype(jnp.float32)),
            state.direction,
            new,
            params,
        )
        count = state.count + 1
        following = distance(count) if rate is None else distance(count) * rate
        return updates, LookAheadState(count, following, direction, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def look_ahead(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """Where the next gradient is to be taken: ahead of the weights, or at them if the recipe does not look ahead."""
    if isinstance(opt_state, AverageState):
        opt_state = opt_state.inner
    return _moved(params, opt_state) if isinstance(opt_state, LookAheadState) else params


def _moved(params: optax.Params, state: LookAheadState) -> optax.Params:
    return jax.tree.map(
        lambda x, l: (x.astype(jnp.float32) + state.distance * l).astype(x.dtype), params, state.direction
    )
