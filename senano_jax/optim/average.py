"""An average of the weights over the end of a run, read out in their place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from senano_jax.optim.config import TailAverage
from senano_jax.optim.groups import parameter_group


class AverageState(NamedTuple):
    """The average, and the state of the optimiser that it is of."""

    count: Int[Array, ""]  # steps taken
    share: Float[Array, ""]  # of the average in what is read out; 0 until it begins
    average: optax.Params  # float32, like the averaged parameters; optax.MaskedNode for the others
    inner: optax.OptState


def with_tail_average(
    optimizer: optax.GradientTransformation, settings: TailAverage, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The same updates, and an average a of the weights w that they lead to (float32):

        a <- w                      until the share `start` of `steps` has been taken
        a <- a + (w - a) / horizon  after every later step, the horizon in steps

    `read_out` uses it.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    first = max(round(settings.start * steps), 1)  # not the weights of the state: a run may replace them at its start
    horizon = max(settings.horizon * steps, 1)

    def of_groups(params):
        def keep(path, parameter):
            return parameter if parameter_group(path) in settings.groups else optax.MaskedNode()

        return jax.tree.map_with_path(keep, params)

    def init(params):
        average = optax.tree.cast(of_groups(params), jnp.float32)
        return AverageState(jnp.zeros((), jnp.int32), jnp.zeros(()), average, optimizer.init(params))

    def update(gradients, state, params, **arguments):
        updates, inner = optimizer.update(gradients, state.inner, params, **arguments)
        count = state.count + 1
        weights = optax.tree.cast(of_groups(optax.apply_updates(params, updates)), jnp.float32)
        average = jax.tree.map(lambda a, w: jnp.where(count <= first, w, a + (w - a) / horizon), state.average, weights)
        share = jnp.where(count < first, jnp.float32(0), settings.share)
        return updates, AverageState(count, share, average, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def read_out(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The weights to evaluate, in their parameters' types: (1 - share) w + share a where the recipe has an average that
    has begun, the parameters themselves otherwise."""
    if not isinstance(opt_state, AverageState):
        return params

    def blend(w: Array, a: Any) -> Array:
        if isinstance(a, optax.MaskedNode):
            return w
        return ((1 - opt_state.share) * w.astype(jnp.float32) + opt_state.share * a).astype(w.dtype)

    return jax.tree.map(blend, params, opt_state.average)
