"""What a run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from senano_jax.config import Config
from senano_jax.model.gpt import Gpt
from senano_jax.training.mesh import replicated

Params = Any  # nested dictionary of arrays


class TrainState(NamedTuple):
    step: Int[Array, ""]  # optimiser steps taken
    params: Params
    opt_state: optax.OptState


def make_model(config: Config) -> Gpt:
    return Gpt(config.model, jnp.dtype(config.dtype))


def abstract_params(model: Gpt) -> Params:
    """Shapes and dtypes of the parameters; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)  # no parameter depends on the length
    return jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, 1)["params"]


def abstract_state(model: Gpt, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a whole state; allocates nothing."""
    params = abstract_params(model)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def count_parameters(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def init_state(model: Gpt, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices and the same on all of them."""

    def init(key):
        tokens = jnp.zeros((1, 128), jnp.int32)
        params = model.init(key, tokens, tokens, 1)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))


def with_params(state: TrainState, params: Params, mesh: Mesh) -> TrainState:
    """The state with other weights (NumPy arrays are fine)."""
    return state._replace(params=jax.device_put(params, replicated(mesh)))
