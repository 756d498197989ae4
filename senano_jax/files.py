"""Files that are written whole or not at all, small ones that are not trusted when read, and what arguments name."""

import contextlib
import dataclasses
import glob
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from senano_jax.errors import UserError

MAX_JSON_BYTES = 1 << 20  # of a file that holds one object

Arguments = TypeVar("Arguments")


def expand_home(path: str | os.PathLike) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder; as it is where there is no such user."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a name that no user can have, such as one with a zero byte
        return Path(path)


def expand(pattern: str | os.PathLike) -> list[Path]:
    """The paths that an argument names, sorted as text; none where nothing matches.

    `~` is expanded. A path that exists is that path, brackets and stars in its name included; all else is a glob, in
    which `**` crosses folders, behind the folders that exist by their names.
    """
    if not os.fspath(pattern):
        return []  # not the working folder
    path = expand_home(pattern)
    if os.path.lexists(path):
        return [path]
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    literally = os.path.join(glob.escape(str(folder)), path.relative_to(folder))
    try:
        return [Path(match) for match in sorted(glob.glob(literally, recursive=True))]
    except ValueError:  # a zero byte
        return []


@contextlib.contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """An absolute path of a folder for libraries that take brackets for a pattern, a backslash for an escape, or a name
    for UTF-8: through a link elsewhere, where the name has any of them."""
    path = str(folder.absolute())
    if not set("[]\\") & set(path) and path.isprintable():  # half a character, of another encoding, is not
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="senano-link-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute())
        yield link


def with_home(arguments: Arguments) -> Arguments:
    """A dataclass of arguments with the home folder expanded in each path."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    paths = {name: expand_home(value) for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(arguments, **paths)


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


def read_toml(path: Path) -> dict:
    """The tables in a TOML file. Raises UserError for a missing, damaged or very large one."""
    try:
        return tomllib.loads(_read_small(path, "check the name", "give a configuration").decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML ({' '.join(str(error).split())}); mend it") from None


def read_json_object(path: Path) -> dict:
    """The object in a file of a run folder. Raises UserError for a missing, damaged or very large one."""
    try:
        value = json.loads(_read_small(path, "give the folder of a run", "restore the file that the run wrote"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; restore the file that the run wrote")
    return value


def _read_small(path: Path, if_missing: str, if_large: str) -> bytes:
    """Its bytes. Raises UserError, with what to do, for a missing or very large one."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {if_missing}") from None
    if len(raw) > MAX_JSON_BYTES:
        raise UserError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB; {if_large}")
    return raw
