"""What a run carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from senano_jax.model.build import Model, Params, abstract_params
from senano_jax.optim.average import read_out
from senano_jax.optim.shares import SharedMuonState
from senano_jax.training.mesh import DATA_AXIS, replicated


class TrainState(NamedTuple):
    """Everything that a step changes, on all devices alike but for what they share."""

    step: Int[Array, ""]  # optimiser steps taken
    params: Params
    opt_state: optax.OptState


def abstract_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a whole state; allocates nothing."""
    params = abstract_params(model)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """For each array of a state, or of its abstract form, how it lies on the devices: all of it on each, or a share of
    it where the devices share the averages of matrices."""

    def place(node):
        if not isinstance(node, SharedMuonState):
            return replicated(mesh)
        shared = jax.tree.map(lambda _: NamedSharding(mesh, P(DATA_AXIS)), node)
        return shared._replace(count=replicated(mesh))

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, SharedMuonState))


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices."""

    def init(key):
        tokens = jnp.zeros((1, 128), jnp.int32)
        params = model.init(key, tokens, tokens, 1)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = state_shardings(abstract_state(model, optimizer), mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def params_to_evaluate(state: TrainState) -> Params:
    """What the optimiser reads out: an average of its own, or the parameters themselves, the same object."""
    return read_out(state.opt_state, state.params)


def with_params(state: TrainState, params: Params, mesh: Mesh) -> TrainState:
    """The state with other weights (NumPy arrays are fine)."""
    return state._replace(params=jax.device_put(params, state_shardings(state, mesh).params))
