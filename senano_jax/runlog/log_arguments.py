"""What the arguments of `compare` name: LOG, LOG@TOKENS, and NAME=LOG,LOG of such."""

import os
import re
from dataclasses import dataclass

from senano_jax.errors import UserError
from senano_jax.files import expand, expand_home
from senano_jax.runlog.batch_plan import BatchPlan
from senano_jax.runlog.reader import PUBLISHED_PREFIX

_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Source:
    """One log."""

    path: str
    """A path, or published:NAME."""
    batch: BatchPlan | None
    """The tokens of its steps, if the argument says so."""

    @property
    def identity(self) -> str:
        """Equal for two spellings of one log."""
        return self.path if self.path.startswith(PUBLISHED_PREFIX) else os.path.realpath(self.path)


def split_argument(argument: str) -> tuple[str | None, list[Source]]:
    """The name, if there is one, and the logs; `~` and globs are expanded, and a path that exists is a path, whatever
    signs it holds. Raises UserError for an argument that names no log."""
    match = re.fullmatch(r"([^=/]+)=(.*)", argument, re.DOTALL)
    if match is None or _exists(argument):
        return None, _sources(argument)
    name, logs = match[1].strip(), match[2]
    if not name or not name.isprintable():
        raise UserError(f"{argument!r}: the name before '=' is empty or not printable; write NAME=LOG,LOG")
    pieces = [logs] if _exists(logs) else [piece for piece in logs.split(",") if piece]
    if not pieces:
        raise UserError(f"{argument!r} names no log; write NAME=LOG,LOG")
    return name, [source for piece in pieces for source in _sources(piece)]


def _sources(text: str) -> list[Source]:
    path, at, tokens = text.rpartition("@")
    is_batch = at and path and tokens[:1].isdigit() and not _exists(text)
    path, batch = (path, BatchPlan.parse(tokens, text)) if is_batch else (text, None)
    if path.startswith(PUBLISHED_PREFIX) or not path:
        return [Source(path, batch)]
    found = [str(match) for match in expand(path)]
    if not found and _GLOB.search(path):
        raise UserError(f"{path} matches no file; give run folders, PyTorch logs or published:NAME")
    return [Source(match, batch) for match in found or [str(expand_home(path))]]


def _exists(path: str) -> bool:
    return os.path.lexists(expand_home(path))
