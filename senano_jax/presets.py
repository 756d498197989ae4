"""The configurations that have a name: the systems of the record table, ideas for fewer tokens, and what a program
registers."""

import re
from collections.abc import Callable

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.ladder import (
    attnres_recurrent,
    attnres_recurrent_ramp,
    batch_ramp,
    cautious_decay,
    depth_attention,
    difference_recurrent_ramp,
    exclusive,
    head_gate,
    key_offset,
    multi_token,
    normuon,
    paired_heads,
    polar_express,
    rare_adam,
    shifted_cap,
    strict,
    tail_average,
    tied_recurrent,
    tied_recurrent_ramp,
    weighted,
    wide_recurrent,
    wide_recurrent_ramp,
)
from senano_jax.preset_file import made, names_file, preset_of_file
from senano_jax.record_systems import demo, llmc, no_value_embeddings, recurrent, value_embeddings

PRESETS: dict[str, Callable[[], Config]] = {
    "recurrent": recurrent,
    "no-value-embeddings": no_value_embeddings,
    "value-embeddings": value_embeddings,
    "llmc": llmc,
    "tied-recurrent": tied_recurrent,
    "tied-recurrent-ramp": tied_recurrent_ramp,
    "wide-recurrent": wide_recurrent,
    "wide-recurrent-ramp": wide_recurrent_ramp,
    "attnres-recurrent": attnres_recurrent,
    "attnres-recurrent-ramp": attnres_recurrent_ramp,
    "difference-recurrent-ramp": difference_recurrent_ramp,
    "demo": demo,
    "polar-express": polar_express,
    "batch-ramp": batch_ramp,
    "normuon": normuon,
    "cautious-decay": cautious_decay,
    "rare-adam": rare_adam,
    "tail-average": tail_average,
    "strict": strict,
    "head-gate": head_gate,
    "exclusive": exclusive,
    "key-offset": key_offset,
    "paired-heads": paired_heads,
    "weighted": weighted,
    "depth-attention": depth_attention,
    "shifted-cap": shifted_cap,
    "multi-token": multi_token,
}


_OURS = frozenset(PRESETS)


def preset(name: str) -> Config:
    """The configuration called `name`, or that of a Python file's function: FILE.py:FUNCTION.

    Raises UserError with the known names for another one, and for a function or a file that makes none.
    """
    if names_file(name):
        return preset_of_file(name)
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; choose one of {', '.join(PRESETS)}; or give FILE.py:FUNCTION")
    return PRESETS[name]() if name in _OURS else made(PRESETS[name], name)


def preset_names() -> tuple[str, ...]:
    """The presets of this package, then those that were registered."""
    return tuple(PRESETS)


def can_name(name: str) -> bool:
    """Whether a preset, or a run, can be called so: by a command line, and as a part of a file's name."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and not names_file(name)


def register(name: str, function: Callable[[], Config]) -> None:
    """Makes the configuration that `function` returns a preset of this process, in place of one registered before.

    Raises UserError for the name of a preset of this package, and for one that a command line could not give.
    """
    if name in _OURS:
        raise UserError(f"there is a preset {name!r} already; choose another name")
    if not can_name(name):
        raise UserError(f"{name!r} cannot name a preset; use letters, digits and . _ + -")
    PRESETS[name] = function
