"""Shards kept as NAME.bin.xz, unpacked once."""

import contextlib
import glob
import lzma
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from senano_jax.data.shards import find_shards, open_shard
from senano_jax.errors import UserError

PACKED = ".xz"
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_COMPARED_BYTES = 1 << 16  # of a shard that is there already, header included


def unpacked(pattern: str, folder: Path | None, say: Callable[[str], None]) -> str:
    """The glob of the shards that the glob `pattern` means: itself, or that of the files unpacked from *.bin.xz.

    They go into `folder` or, if it is None, beside the packed ones, each whole or not at all; those that are there
    already are kept. Raises UserError for damaged files, for others of the same names, and if there is no room.
    """
    if not pattern.endswith(PACKED):
        return pattern
    if glob.has_magic(os.path.dirname(pattern)):
        raise UserError(f"{pattern!r}: packed shards must lie in one folder; use * and ? in the name of the files only")
    packed = find_shards(pattern)
    folder = packed[0].parent if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot hold unpacked shards ({error.strerror}); give --unpack-to a folder") from None
    shards = [folder / path.name.removesuffix(PACKED) for path in packed]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decompression releases the interpreter
        for line in pool.map(_unpack, packed, shards):
            if line:
                say(line)
    plain = str(Path(glob.escape(str(folder))) / os.path.basename(pattern).removesuffix(PACKED))
    if others := sorted(set(find_shards(plain)) - set(shards)):
        raise UserError(f"{plain!r} matches {others[0]} too, which {pattern!r} does not hold; give another --unpack-to")
    return plain


def _unpack(packed: Path, shard: Path) -> str | None:
    """What was done, in a line; None if the shard was there."""
    temporary = shard.with_name(f".{shard.name}.{os.getpid()}.tmp")
    try:
        if shard.exists():
            open_shard(shard)
            with lzma.open(packed) as source, shard.open("rb") as file:
                if source.read(_COMPARED_BYTES) != file.read(_COMPARED_BYTES):
                    raise UserError(f"{shard} is not what {packed} holds; delete it, or give another --unpack-to")
            return None
        if not shard.parent.stat().st_mode & _ANY_WRITE:  # which would not stop root
            raise UserError(f"{shard.parent} is read-only; give --unpack-to another folder")
        with lzma.open(packed) as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        open_shard(temporary)
        temporary.replace(shard)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{packed} is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{shard} cannot be unpacked ({error.strerror}); give --unpack-to another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return f"unpacked {shard}"
