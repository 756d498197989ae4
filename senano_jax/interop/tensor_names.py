"""Which tensors a file must hold, and the error if it holds others."""

from collections.abc import Iterable

from senano_jax.errors import UserError


def check_names(source: str, needed: Iterable[str], held: Iterable[str]) -> None:
    """Raises UserError, naming some of them, if `source` lacks tensors that a model needs or holds others."""
    needed, held = set(needed), set(held)
    if missing := sorted(needed - held):
        raise UserError(f"{source} lacks {_some(missing)}; is it a checkpoint of another --preset or --model.layers?")
    if extra := sorted(held - needed):
        raise UserError(f"{source} holds {_some(extra)}, unknown to this model; is it a checkpoint of another preset?")


def _some(names: list[str]) -> str:
    shown = ", ".join(name if name.isprintable() and len(name) <= 100 else ascii(name)[:100] for name in names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
