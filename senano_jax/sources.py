"""Where weights are kept, told by a name: the folder of a run, or a file."""

from senano_jax.command_line import import_jax
from senano_jax.config import Config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import expand_home

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pt", ".pth")


def config_of(source: str) -> Config | None:
    """The configuration that comes with weights: in the folder of a run, or in a safetensors file that has one.

    A safetensors file is read with JAX imported. Raises UserError if it is damaged, or if JAX cannot be imported.
    """
    path = expand_home(source)
    if (path / "config.json").is_file():
        return read_config(path / "config.json")[0]
    if path.suffix != SAFETENSORS or not path.is_file():
        return None
    import_jax()  # which the next line does too, with a traceback where it cannot
    from senano_jax.interop.safetensors_file import config_in_safetensors

    return config_in_safetensors(path)


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
