"""Weights as a safetensors file: each parameter under its path in the tree, such as `loop.layer_3.attention.qkv`.

The metadata hold what else belongs to them, as text: `config`, the run's config.json; `step`, the steps that they were
trained for; `senano_jax`, the version that wrote them.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from senano_jax.config import Config
from senano_jax.config_file import config_from
from senano_jax.errors import UserError
from senano_jax.files import MAX_JSON_BYTES, write_atomically
from senano_jax.interop.tensor_names import check_names
from senano_jax.model.build import Params
from senano_jax.sources import SAFETENSORS
from senano_jax.versions import installed_version


def write_safetensors(path: Path, params: Params, step: int, config_json: str) -> None:
    """Writes the parameters in their own types (a bfloat16 embedding stays one), whole or not at all.

    `config_json` is the text of the run's config.json. Raises UserError if the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in _by_name(params).items()}
    metadata = {"config": config_json, "step": str(step), "senano_jax": installed_version() or "unknown"}
    write_atomically(path, save(arrays, metadata))


def read_safetensors(path: Path, abstract: Params) -> tuple[Params, int | None]:
    """The parameters, NumPy arrays in the types of `abstract`, and the step; None where the file does not tell it.

    `abstract` is the model's tree of shapes and dtypes. Raises UserError if the file is damaged or of another model.
    """
    wanted = _by_name(abstract)
    with _Open(path) as file:
        step = file.metadata.get("step")
        if step is not None and not (step.isascii() and step.isdigit() and len(step) < 10):
            raise UserError(f"{path}: its metadata call the step {step[:60]!r}, not a number; export it again")
        check_names(str(path), wanted, file.names)
        leaves = [_fitting(path, name, file.tensor(name), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves), None if step is None else int(step)


def config_in_safetensors(path: Path) -> Config | None:
    """The configuration of the run that the weights are from; None where the file does not tell it.

    Raises UserError if the file is damaged, or what it tells is none.
    """
    with _Open(path) as file:
        text = file.metadata.get("config")
    if text is None:
        return None
    try:
        document = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{path}: the config in its metadata is not a JSON object; export it again")
    return config_from(document, path)[0]


class _Open:
    """A context manager: the file, checked by the library to be whole. Raises UserError where it is not."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "_Open":
        try:
            if not self._path.is_file():
                raise UserError(f"{self._path} is not a file; give weights ({SAFETENSORS})")
            self._file = safe_open(self._path, framework="numpy", backend="pread")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.names = list(self._file.keys())
        except UserError:
            raise
        except Exception as error:  # of the library, of the system, or for a name that is none
            raise self._unreadable(error) from None
        return self

    def __exit__(self, *_) -> None:
        del self._file  # and with it the mapping

    def tensor(self, name: str) -> np.ndarray:
        try:
            return self._file.get_tensor(name)
        except Exception as error:  # a type that NumPy does not have, or a shape that is too large for it
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:150]
        return UserError(
            f"{str(self._path)[:200]} cannot be read as a safetensors file: {reason}; copy or export it again"
        )


def _fitting(path: Path, name: str, array: np.ndarray, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{path}: {name} is of type {array.dtype}, not floating-point weights")
    if array.shape != wanted.shape:
        raise UserError(f"{path}: {name} has shape {array.shape}, this model needs {tuple(wanted.shape)}")
    return array.astype(wanted.dtype)


def _by_name(tree: Params) -> dict[str, jax.Array]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}
