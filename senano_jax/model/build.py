"""From a model's configuration to the model, and what can be said of its parameters without allocating them."""

from typing import Any

import jax
import jax.numpy as jnp

from senano_jax.model.config import Gpt2Config, ModelConfig
from senano_jax.model.gpt import Gpt
from senano_jax.model.gpt2 import Gpt2

Model = Gpt | Gpt2  # applied to (inputs, targets, window_blocks) it gives the summed loss
Params = Any  # nested dictionary of arrays


def make_model(config: ModelConfig | Gpt2Config, dtype: str) -> Model:
    """The model, with activations (and the embedding tables of a `ModelConfig`) of type `dtype`."""
    kind = Gpt2 if isinstance(config, Gpt2Config) else Gpt
    return kind(config, jnp.dtype(dtype))


def abstract_params(model: Model) -> Params:
    """Shapes and dtypes of the parameters; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)  # no parameter depends on the length
    return jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, 1)["params"]


def count_parameters(params: Params) -> int:
    """Numbers in a tree of arrays, or of their shapes; shared ones count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
