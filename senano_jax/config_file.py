"""config.json of a run folder: every resolved value of a run."""

import dataclasses
import json
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.files import read_json_object, read_toml, write_atomically

_LARGEST_INT = 2**63  # a float holds it; JSON knows integers of thousands of digits
_RESTORE, _OTHER_VERSION = "restore the file that the run wrote", "was it written by another version?"


def write_config(path: Path, config: Config, preset: str, parameters: int) -> None:
    """Writes config.json, whole or not at all. Raises UserError if it cannot be written."""
    write_atomically(path, to_text(config, preset, parameters=parameters).encode())


def to_text(config: Config, preset: str, **more: int) -> str:
    """What `read_config` reads; `more` are fields that it passes over."""
    return json.dumps({"preset": preset, **more, **to_document(config)}, indent=2) + "\n"


def read_config(path: Path) -> tuple[Config, str]:
    """The configuration and the name of the preset it was derived from.

    `path` may be TOML of the same form too, if its name says so. Raises UserError naming the file and the field that is
    missing, unknown or of another type.
    """
    return config_from(read_toml(path) if path.suffix == ".toml" else read_json_object(path), path)


def config_from(document: dict[str, Any], path: Path) -> tuple[Config, str]:
    """That of the object in a config.json, which `path` holds. Raises UserError as `read_config` does."""
    preset = document.pop("preset", None)
    document.pop("parameters", None)
    return parse(Config, upgraded(document), path, ""), preset if isinstance(preset, str) else "unknown"


def to_document(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, to be written as JSON. Where a field takes one of several classes, its value names its
    own as `kind`."""
    types = typing.get_type_hints(type(config))
    return {f.name: _to_json(types[f.name], getattr(config, f.name)) for f in dataclasses.fields(config)}


def _to_json(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return ({"kind": type(value).__name__} if _classes(kind) else {}) | to_document(value)
    if isinstance(value, tuple):
        kinds = _items(kind, len(value)) or [None] * len(value)
        return [_to_json(item_kind, item) for item_kind, item in zip(kinds, value)]
    return value


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote, as this one would write it."""
    model, optimizer = document.get("model"), document.get("optimizer")
    if isinstance(model, dict) and "kind" not in model:
        document = document | {"model": {"kind": "ModelConfig" if "layers" in model else "Gpt2Config"} | model}
    if isinstance(optimizer, dict):
        document = document | {"optimizer": _upgraded_optimizer(optimizer)}
    return document


# Where the flat fields of earlier optimisers are now; what Adam's groups shared, each of them has.
_MUON_AND_ADAM = {
    "muon_lr": ["matrices.rate"],
    "head_lr": ["head.rate"],
    "embed_lr": ["embeddings.rate"],
    "scalar_lr": ["scalars.rate"],
    "adam_b1": ["head.b1", "embeddings.b1", "scalars.b1"],
    "adam_b2": ["head.b2", "embeddings.b2", "scalars.b2"],
    "adam_eps": ["head.eps", "embeddings.eps", "scalars.eps"],
    "momentum_start": ["matrices.momentum.start"],
    "momentum_end": ["matrices.momentum.end"],
    "momentum_warmup_steps": ["matrices.momentum.warmup_steps"],
    "cooldown_fraction": ["schedule.fraction"],
    "final_lr_factor": ["schedule.floor"],
}
_ADAMW = {
    "learning_rate": ["matrices.rate"],
    "warmup_steps": ["schedule.warmup_steps"],
    "b1": ["matrices.b1"],
    "b2": ["matrices.b2"],
    "eps": ["matrices.eps"],
    "weight_decay": ["matrices.decay"],
}


def _upgraded_optimizer(flat: dict[str, Any]) -> dict[str, Any]:
    """A recipe that says so, if given one that does not, or the fields of an optimiser from before there were any."""
    if "matrices" in flat or not {"muon_lr", "learning_rate"} & flat.keys():
        return flat if "kind" in flat else {"kind": "Recipe"} | flat
    if "muon_lr" in flat:
        moved, recipe = _MUON_AND_ADAM, {"matrices": {"kind": "MuonRule"}, "schedule": {"kind": "Cooldown"}}
    else:
        moved, recipe = _ADAMW, {"matrices": {"kind": "AdamRule"}, "schedule": {"kind": "WarmupCosine"}}
        recipe["mean_gradients"] = True
    for name in (name for name in moved if name in flat):  # in this order, whatever Python's hashes are
        for path in moved[name]:
            *parts, last = path.split(".")
            place = recipe
            for part in parts:
                place = place.setdefault(part, {})
            place[last] = flat[name]
    kept = {name: value for name, value in flat.items() if name not in moved and name != "kind"}
    return {"kind": "Recipe"} | recipe | kept


def parse(kind: Any, value: Any, path: Path, field: str) -> Any:
    """`value` as an instance of `kind`: a dataclass, a tuple, a plain type, Literal or a union of those.

    Raises UserError naming the file and the field that does not fit.
    """
    if isinstance(value, dict) and (classes := _classes(kind)):
        name, value = value.get("kind"), {key: item for key, item in value.items() if key != "kind"}
        if name not in classes:
            raise UserError(
                f"{path}: {_join(field, 'kind')} is {_text(name)[:60]!r}, not one of {', '.join(classes)}; "
                f"{_remedy(path, _OTHER_VERSION)}"
            )
        kind = classes[name]
    elif isinstance(value, dict):
        kind = next(filter(dataclasses.is_dataclass, typing.get_args(kind)), kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {field or 'the document'} is not an object; {_remedy(path)}")
        types = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - types.keys()):
            raise UserError(f"{path}: unknown field {_join(field, unknown[0])}; {_remedy(path, _OTHER_VERSION)}")
        # Of a default and its factory one is MISSING, or both are.
        needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory}
        if missing := sorted(needed - value.keys()):
            raise UserError(f"{path}: field {_join(field, missing[0])} is missing; {_remedy(path, _OTHER_VERSION)}")
        return kind(**{name: parse(types[name], item, path, _join(field, name)) for name, item in value.items()})
    if isinstance(value, list) and (kinds := _items(kind, len(value))) is not None:
        return tuple(
            parse(item_kind, item, path, f"{field}[{n}]") for n, (item_kind, item) in enumerate(zip(kinds, value))
        )
    if _fits(kind, value):
        return float(value) if kind is float else value
    raise UserError(f"{path}: {field} is {_text(value)[:60]!r}; {_remedy(path)}")


def _remedy(path: Path, of_a_run: str = _RESTORE) -> str:
    """What to do about a file: runs write JSON, people TOML."""
    by_hand = "mend it; python -m senano_jax presets NAME prints all fields"
    return by_hand if path.suffix == ".toml" else of_a_run


def _classes(kind: Any) -> dict[str, type]:
    """The dataclasses of a union of several, by name; empty for any other kind."""
    classes = {option.__name__: option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)}
    return classes if len(classes) > 1 else {}


def _items(kind: Any, length: int) -> list[Any] | None:
    """The kind of each item of a list, where `kind` is a tuple or a union with one; None if it takes no such list."""
    for option in typing.get_args(kind) if typing.get_origin(kind) in (UnionType, typing.Union) else (kind,):
        if typing.get_origin(option) is tuple:
            kinds = typing.get_args(option)
            if kinds[-1] is Ellipsis:
                return [kinds[0]] * length
            if len(kinds) == length:
                return list(kinds)
    return None


def _fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        return any(_fits(option, value) for option in typing.get_args(kind))
    if origin is tuple:  # a list that fits is taken item by item
        return False
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
