"""Differences of a configuration, as a table of a study gives them: typed by their fields, and in words."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from senano_jax.config_file import parse
from senano_jax.errors import UserError

# Fields that are not the study's to change, and what decides them.
_DECIDED = {
    "steps": "tokens decides it",
    "seed": "seeds decides it",
    "run_dir": "--out decides it",
    "resume": "the queue decides it",
    "devices": "a run has one device",
}


def differences(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a table changes, without its name and what it derives from."""
    return {key: value for key, value in table.items() if key not in ("name", "from", "preset")}


def typed(where: str, config: Any, table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of differences by their paths, each of the type of its field in `config`. Raises UserError, which
    begins with `where`, for a field that is not there or is set twice, or a value of another type."""
    kinds, values = typing.get_type_hints(type(config)), {}
    for key, value in table.items():
        name, _, rest = key.partition(".")
        path, value = prefix + name, {rest: value} if rest else value
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            known = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(kinds)}"
            raise UserError(f"{where}: {type(config).__name__} has no field {path}; {known}")
        if path in _DECIDED:
            raise UserError(f"{where}: {path} cannot be a difference: {_DECIDED[path]}")
        current = getattr(config, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(current) and "kind" not in value:
            found = typed(where, current, value, path + ".")
        elif value == "None" and type(None) in typing.get_args(kinds[name]):
            found = {path: None}
        else:
            try:
                found = {path: parse(kinds[name], value, Path(where), path)}
            except UserError as error:
                kind = getattr(kinds[name], "__name__", None) if isinstance(kinds[name], type) else None
                raise UserError(f"{str(error).partition(';')[0]}; it takes {kind or kinds[name]}") from None
        check_apart(where, found, values, "set it once")
        values |= found
    return values


def check_apart(where: str, paths: Iterable[str], others: Iterable[str], remedy: str) -> None:
    """Raises UserError if one of `paths` is one of `others`, or a part of it, or has it as a part."""
    for path, other in product(paths, others):
        if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
            raise UserError(f"{where}: {path} is set twice; {remedy}")


def in_words(table: Mapping[str, Any]) -> str:
    """The differences of a variant's table in words, such as "slow; final_window_tokens = 2304"."""
    words = [f"{key} {table[key]}" for key in ("from", "preset") if key in table]
    return "; ".join(words + assignments(differences(table), ""))


def assignments(table: Mapping[str, Any], prefix: str) -> list[str]:
    texts = []
    for key, value in table.items():
        if isinstance(value, dict) and "kind" not in value:
            texts += assignments(value, f"{prefix}{key}.")
        else:
            texts.append(f"{prefix}{key} = {value}")
    return texts
