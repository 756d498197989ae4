"""Weights from where a user keeps them: a PyTorch checkpoint or one of our runs."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from senano_jax.config import Gpt2Config, ModelConfig
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import from_torch, read_torch_checkpoint
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import replicated
from senano_jax.training.state import Params


def load_weights(source: str, config: ModelConfig | Gpt2Config, abstract: Params, mesh: Mesh) -> Params:
    """The weights in `source` (FILE.pt or the folder of a run), on all devices of the mesh.

    `abstract` is the parameter tree they must fit. Raises UserError if they cannot be read or do not fit.
    """
    if source.endswith(".pt"):
        params = from_torch(read_torch_checkpoint(source), config, abstract, source)
        return jax.device_put(params, replicated(mesh))
    if not Path(source).is_dir():
        raise UserError(f"{source} is neither a PyTorch checkpoint (.pt) nor the folder of a run")
    return load_params(Path(source), abstract, mesh)[0]
