"""The processes of a run must run the same program: in what they differ is said before anything else happens."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from senano_jax.config import Config
from senano_jax.config_file import to_document
from senano_jax.errors import UserError
from senano_jax.versions import installed_version

_PACKAGE = Path(__file__).resolve().parents[1]
_OF_A_MACHINE = {"data.train_files", "data.val_files", "compilation_cache"}  # where its files lie


def require_same_program(config: Config) -> None:
    """Raises UserError, the same one in every process, for the first process that differs from process 0, naming in
    what: its devices, a file of this package, the version of JAX, or a field of `config`.

    All must come here, and JAX must have been started.
    """
    kinds: dict[int, Counter[str]] = {}
    for device in jax.devices():
        kinds.setdefault(device.process_index, Counter())[device.device_kind] += 1
    if len(kinds) == 1:
        return
    # Known without the others, and the same number of devices is what asking them needs.
    require_equal([{"devices": _listed(kinds[process])} for process in sorted(kinds)])
    text = json.dumps(program(config)).encode()
    checksums = _gathered(hashlib.sha256(text).digest(), 32)
    if (checksums != checksums[0]).any():
        longest = multihost_utils.process_allgather(np.int32(len(text))).max()
        require_equal([json.loads(row.tobytes().rstrip(b"\0")) for row in _gathered(text, longest)])


def require_equal(programs: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for the first that differs from that of process 0, naming the first thing in which it does."""
    for process, program in enumerate(programs):
        for name in programs[0] | program:
            theirs, first = program.get(name), programs[0].get(name)
            if theirs != first:
                raise UserError(
                    f"process {process} differs from process 0 in {name} ({theirs!s:.60}, not {first!s:.60}); "
                    "start all with the same code, flags and number of devices"
                )


def program(config: Config) -> dict[str, Any]:
    """What a process runs, by name: versions of JAX, checksums of this package's files, and the values of `config`, but
    for where a machine keeps its files."""
    versions = {name: installed_version(name) for name in ("jax", "jaxlib")}
    return versions | checksums_of_files() | values_of(config)


def checksums_of_files() -> dict[str, str]:
    """Of this package, by path."""
    files = {str(path.relative_to(_PACKAGE.parent)): path for path in package_files()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for name, path in files.items()}


def package_files() -> list[Path]:
    """Those of this package that Python can import, sorted; what editors leave beside them is none."""
    return sorted(path for path in _PACKAGE.rglob("*.py") if path.is_file())


def values_of(config: Config) -> dict[str, Any]:
    """The values of `config`, by path, but for where a machine keeps its files."""
    values = dict(_leaves(to_document(config), ""))
    return {path: value for path, value in values.items() if path not in _OF_A_MACHINE}


def _listed(kinds: Counter[str]) -> str:
    return " and ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _leaves(document: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(document, (dict, list)):
        yield path.removeprefix("."), document
        return
    for key, item in document.items() if isinstance(document, dict) else enumerate(document):
        yield from _leaves(item, f"{path}.{key}")


def _gathered(text: bytes, length: int) -> np.ndarray:
    """`text` of every process, filled up with zeros: [processes, length], uint8."""
    mine = np.zeros(length, np.uint8)
    mine[: len(text)] = list(text)
    return multihost_utils.process_allgather(mine)
