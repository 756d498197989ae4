"""Weights from where a user keeps them: a file (safetensors, or a PyTorch checkpoint) or one of our runs."""

import jax
from jax.sharding import Mesh

from senano_jax.config import Gpt2Config, ModelConfig
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.interop.safetensors_file import read_safetensors
from senano_jax.interop.torch_checkpoint import from_torch, read_torch_checkpoint
from senano_jax.model.build import Params
from senano_jax.sources import SAFETENSORS, is_weights_file
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import replicated


def load_weights(
    source: str,
    config: ModelConfig | Gpt2Config,
    abstract: Params,
    mesh: Mesh,
    step: int | None = None,
    *,
    own_model: bool = False,
) -> tuple[Params, int | None]:
    """The weights in `source` (FILE.safetensors, FILE.pt or the folder of a run), on all devices of the mesh, and the
    steps that they were trained for (None for a file that does not tell of how many).

    `abstract` is the parameter tree they must fit; `step` chooses a checkpoint of a run in place of its newest one.
    With `own_model` they are for a model of a program's own; without it a run of one is refused.
    Raises UserError if they cannot be read or do not fit.
    """
    if is_weights_file(source):
        if step is not None:
            raise UserError(f"--step {step} chooses a checkpoint of a run, but {source} holds one state; drop it")
        if expand_home(source).suffix == SAFETENSORS:
            params, steps = read_safetensors(expand_home(source), abstract)
            return jax.device_put(params, replicated(mesh)), steps
        params = from_torch(read_torch_checkpoint(source), config, abstract, source)
        return jax.device_put(params, replicated(mesh)), None
    return load_params(expand_home(source), abstract, mesh, step, own_model=own_model)
