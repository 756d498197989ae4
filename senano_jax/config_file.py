"""config.json of a run folder: every resolved value of a run."""

import dataclasses
import json
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.files import write_atomically

MAX_BYTES = 1 << 20
_LARGEST_INT = 2**63  # a float holds it; JSON knows integers of thousands of digits


def write_config(path: Path, config: Config, preset: str, parameters: int) -> None:
    document = {"preset": preset, "parameters": parameters, **dataclasses.asdict(config)}
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())


def read_config(path: Path) -> tuple[Config, str]:
    """The configuration and the name of the preset it was derived from.

    Raises UserError naming the file and the field that is missing, unknown or of another type.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give the folder of a run") from None
    try:
        document = json.loads(raw) if len(raw) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not the configuration of a run; restore the file that the run wrote")
    preset = document.pop("preset", None)
    document.pop("parameters", None)
    return parse(Config, document, path, ""), preset if isinstance(preset, str) else "unknown"


def parse(kind: Any, value: Any, path: Path, field: str) -> Any:
    """`value` as an instance of `kind`: a dataclass, tuple of integers, plain type, Literal or a union of those."""
    kind = _member(kind, value)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {field or 'the document'} is not an object; restore the file that the run wrote")
        types = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - types.keys()):
            raise UserError(f"{path}: unknown field {_join(field, unknown[0])}; was it written by another version?")
        needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        if missing := sorted(needed - value.keys()):
            raise UserError(f"{path}: field {_join(field, missing[0])} is missing; was it written by another version?")
        return kind(**{name: parse(types[name], item, path, _join(field, name)) for name, item in value.items()})
    if _fits(kind, value):
        if isinstance(value, list):
            return tuple(value)
        return float(value) if kind is float else value
    raise UserError(f"{path}: {field} is {_text(value)[:60]!r}; restore the file that the run wrote")


def _member(kind: Any, value: Any) -> Any:
    """Of a union of dataclasses the one that most of an object's fields belong to; any other kind as it is."""
    options = typing.get_args(kind)
    if not (isinstance(value, dict) and options and all(map(dataclasses.is_dataclass, options))):
        return kind
    return max(options, key=lambda option: len(value.keys() & typing.get_type_hints(option).keys()))


def _fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        return any(_fits(option, value) for option in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, list) and all(_fits(int, item) for item in value)
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and not (isinstance(value, int) and abs(value) > _LARGEST_INT)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _text(value: Any) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError):  # too many digits, or too deep
        return type(value).__name__


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
