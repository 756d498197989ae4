"""Files that appear whole or not at all."""

import os
from pathlib import Path

from senano_jax.errors import UserError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes `path` under a temporary name beside it, then renames. Raises UserError if it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
