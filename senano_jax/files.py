"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path

from senano_jax.errors import UserError


def check_output_file(flag: str, path: Path | None) -> None:
    """Raises UserError if the file that `flag` asks for could not be written for want of its folder, or is one."""
    if path and not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path and path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give a file in it")


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes `path` under a temporary name beside it, then renames. Raises UserError if it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
