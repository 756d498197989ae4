"""Weights from where a user keeps them: a PyTorch checkpoint or one of our runs."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from senano_jax.config import Gpt2Config, ModelConfig
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import from_torch, read_torch_checkpoint
from senano_jax.model.build import Params
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import replicated


def load_weights(
    source: str, config: ModelConfig | Gpt2Config, abstract: Params, mesh: Mesh, step: int | None = None
) -> tuple[Params, int | None]:
    """The weights in `source` (FILE.pt or the folder of a run), on all devices of the mesh, and the steps that they
    were trained for (None for a file, which does not tell of how many).

    `abstract` is the parameter tree they must fit; `step` chooses a checkpoint of a run in place of its newest one.
    Raises UserError if they cannot be read or do not fit.
    """
    if source.endswith(".pt"):
        if step is not None:
            raise UserError(f"--step {step} chooses a checkpoint of a run, but {source} holds one state; drop it")
        params = from_torch(read_torch_checkpoint(source), config, abstract, source)
        return jax.device_put(params, replicated(mesh)), None
    if not Path(source).is_dir():
        raise UserError(f"{source} is neither a PyTorch checkpoint (.pt) nor the folder of a run")
    return load_params(Path(source), abstract, mesh, step)
