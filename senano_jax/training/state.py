"""What a run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from senano_jax.config import Config, Gpt2Config
from senano_jax.model.gpt import Gpt
from senano_jax.model.gpt2 import Gpt2
from senano_jax.training.mesh import replicated

Model = Gpt | Gpt2  # applied to (inputs, targets, window_blocks) it gives the summed loss
Params = Any  # nested dictionary of arrays


class TrainState(NamedTuple):
    step: Int[Array, ""]  # optimiser steps taken
    params: Params
    opt_state: optax.OptState


def make_model(config: Config) -> Model:
    kind = Gpt2 if isinstance(config.model, Gpt2Config) else Gpt
    return kind(config.model, jnp.dtype(config.dtype))


def abstract_params(model: Model) -> Params:
    """Shapes and dtypes of the parameters; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)  # no parameter depends on the length
    return jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, 1)["params"]


def abstract_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a whole state; allocates nothing."""
    params = abstract_params(model)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def count_parameters(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices and the same on all of them."""

    def init(key):
        tokens = jnp.zeros((1, 128), jnp.int32)
        params = model.init(key, tokens, tokens, 1)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))


def with_params(state: TrainState, params: Params, mesh: Mesh) -> TrainState:
    """The state with other weights (NumPy arrays are fine)."""
    return state._replace(params=jax.device_put(params, replicated(mesh)))
