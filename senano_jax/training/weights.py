"""Weights from where a user keeps them: a file (safetensors, or a PyTorch checkpoint) or one of our runs."""

import jax
from jax.sharding import Mesh

from senano_jax.config import Config, Gpt2Config, ModelConfig
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.interop.safetensors_file import SUFFIX, config_in_safetensors, read_safetensors
from senano_jax.interop.torch_checkpoint import from_torch, read_torch_checkpoint
from senano_jax.model.build import Params
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import replicated

SUFFIXES = (SUFFIX, ".pt", ".pth")


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
        if expand_home(source).suffix == SUFFIX:
            params, steps = read_safetensors(expand_home(source), abstract)
            return jax.device_put(params, replicated(mesh)), steps
        params = from_torch(read_torch_checkpoint(source), config, abstract, source)
        return jax.device_put(params, replicated(mesh)), None
    return load_params(expand_home(source), abstract, mesh, step, own_model=own_model)


def config_of(source: str) -> Config | None:
    """The configuration that comes with weights: in the folder of a run, or in a safetensors file that has one.

    Raises UserError if it is damaged.
    """
    path = expand_home(source)
    if (path / "config.json").is_file():
        return read_config(path / "config.json")[0]
    return config_in_safetensors(path) if path.suffix == SUFFIX and path.is_file() else None


def is_weights_file(source: str) -> bool:
    """Whether `source` is a file of weights and not the folder of a run, which it is else.

    Raises UserError, with what it is and what to give in its place, if it cannot be either.
    """
    path, neither = expand_home(source), f"{source} is neither weights (.safetensors, .pt) nor the folder of a run"
    if path.suffix in SUFFIXES and not path.is_dir():
        return True  # or will be refused as one
    if path.parent.name == "checkpoints" and path.name.isdigit():
        raise UserError(f"{neither}, but a checkpoint in one; give {path.parents[1]} (with --step {path.name})")
    if path.is_file():
        if (path.parent / "config.json").is_file():
            raise UserError(f"{neither}, but a file in one; give {path.parent}")
        return True
    if not (path / "config.json").is_file():
        why = "there is no such file" if path.exists() else f"nothing is called {source}: check the name"
        raise UserError(
            f"{neither}: {path / 'config.json'} cannot be read ({why}); give the folder of a run, such as logs/<run-id>"
        )
    return False
