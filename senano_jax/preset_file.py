"""Presets of somebody's own: a function in a Python file that returns a configuration, called FILE.py:FUNCTION."""

import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.files import expand_home

_MODULE = "senano_jax_preset_file"  # what a file that is run is called, so that it hides no module of its name


def names_file(name: str) -> bool:
    """Whether it is of the form FILE.py or FILE.py:FUNCTION."""
    return re.search(r"\.py(:\w*)?$", name) is not None


def without_folder(name: str) -> str:
    """FILE.py:FUNCTION without the folders of FILE; any other name as it is."""
    return Path(name).name if names_file(name) else name


def preset_of_file(name: str) -> Config:
    """The configuration that FUNCTION of FILE.py returns. Runs the file.

    Raises UserError for a file that cannot be read or fails, and for a function that is not there or makes none.
    """
    file, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    path = expand_home(file)
    if not path.is_file():
        raise UserError(f"{file} is not there; give FILE.py:FUNCTION, a function that returns a Config")
    try:
        found = runpy.run_path(str(path), run_name=_MODULE)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} failed ({_told(error)}); mend the file") from error
    own = [
        name
        for name, value in found.items()
        if inspect.isfunction(value) and value.__module__ == _MODULE and not name.startswith("_")
    ]
    if function not in own:
        there = ", ".join(f"{file}:{name}" for name in own) or "none: write one that returns a Config"
        raise UserError(f"{name} names no function of the file; there are {there}")
    return made(found[function], name)


def made(function: Callable[[], Config], name: str) -> Config:
    """What `function` returns. Raises UserError if it fails or if that is no configuration."""
    try:
        config = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the preset {name} failed ({_told(error)}); mend its function") from error
    if not isinstance(config, Config):
        raise UserError(f"the preset {name} returned {type(config).__name__}, not a Config; mend its function")
    return config


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]
