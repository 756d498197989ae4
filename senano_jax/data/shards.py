"""The shard format: GPT-2 tokens in a flat file.

A shard is a header of 256 little-endian int32 (magic number, version, token count, then zeros) and after it
the tokens, little-endian uint16. It is the format of the published FineWeb shards and of the PyTorch program.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt16

from senano_jax.data.vocabulary import VOCAB_SIZE
from senano_jax.errors import UserError
from senano_jax.files import expand, expand_home, write_atomically

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_TOKENS = 2**31 - 1  # a shard, because the header counts in int32

_FETCH_AGAIN = "delete it and download or tokenize it again"


def find_shards(pattern: str) -> list[Path]:
    """The files that match the glob `pattern`, sorted by name; `**` crosses folders.

    Raises UserError where nothing matches.
    """
    if paths := expand(pattern):
        return paths
    there = next((folder for folder in expand_home(pattern).parents if os.path.lexists(folder)), Path("."))
    raise UserError(
        f"no shard matches {pattern!r}: check the name (there is a folder {there}), fetch FineWeb with "
        "`python scripts/download_fineweb.py`, or point --data.train-files and --data.val-files at shards you have"
    )


def open_shard(path: str | os.PathLike) -> np.memmap:
    """The tokens of a shard, a read-only memory map, uint16 [tokens], once its header and its size agree.

    The tokens themselves are not looked at: `check_tokens` does that for what is read.
    Raises UserError naming the file for whatever keeps it from being a whole shard.
    """
    file, count = _open(path)
    with file:
        return np.memmap(file, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


class Shard:
    """The tokens of a shard, read when they are asked for; safe to use from several threads.

    For long runs: should the file be cut short after it was opened, a memory map would kill the process.
    Raises UserError like `open_shard`.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._file, self._count = _open(path)

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, end: int) -> UInt16[np.ndarray, "end-first"]:
        """Tokens `first` to `end`, without `end`. Raises UserError if they can no longer be read."""
        tokens = np.empty(end - first, "<u2")
        unread, at = memoryview(tokens.view(np.uint8)), HEADER_BYTES + TOKEN_BYTES * first
        try:
            while unread and (count := os.preadv(self._file.fileno(), [unread], at)):
                unread, at = unread[count:], at + count
        except OSError as error:
            raise UserError(
                f"cannot read the shard {self._path} any more ({error.strerror or error}): check the disk and resume"
            ) from error
        if unread:
            raise UserError(
                f"{self._path} was cut short while it was in use: it ends before token {end} of {self._count}; "
                f"{_FETCH_AGAIN}, and resume"
            )
        return tokens


def _open(path: str | os.PathLike) -> tuple[BinaryIO, int]:
    """The file of a shard and its number of tokens."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open, which would wait for ever on a pipe
            raise UserError(f"{path} is not a regular file: give shards, or a glob such as '{path}/*.bin'")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            count = _token_count(path, file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size)
            stack.pop_all()
            return file, count
    except (OSError, ValueError) as error:  # ValueError: no name of a file, such as one with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the shard {path} ({reason}): check that it exists and may be read") from error


def _token_count(path: str | os.PathLike, header: bytes, file_bytes: int) -> int:
    """The count in the header, or UserError where the header is not one or disagrees with the file's size."""
    if len(header) < HEADER_BYTES:
        raise UserError(
            f"{path} is too short for a shard: {len(header)} bytes, the header alone has {HEADER_BYTES}; {_FETCH_AGAIN}"
        )
    magic, version, count = (int(value) for value in np.frombuffer(header, "<i4", count=3))
    if magic != MAGIC:
        raise UserError(
            f"{path} is not a shard: it starts with {magic} instead of {MAGIC}; "
            "make shards from text with `python scripts/tokenize_text.py`"
        )
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, only {VERSION} is understood; {_FETCH_AGAIN}")
    if count <= 0:
        raise UserError(f"{path} says that it holds {count} tokens; {_FETCH_AGAIN}")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * count
    if file_bytes != expected_bytes:
        fault = "is cut short" if file_bytes < expected_bytes else "is too long"
        raise UserError(
            f"{path} {fault}: {count} tokens in its header make {expected_bytes} bytes, "
            f"the file has {file_bytes}; {_FETCH_AGAIN}"
        )
    return count


def check_tokens(path: str | os.PathLike, tokens: np.ndarray, first: int) -> None:
    """Raises UserError if one of `tokens`, found in `path` from token `first` on, is not GPT-2's."""
    if tokens.size and tokens.max() >= VOCAB_SIZE:
        position = int(np.argmax(tokens >= VOCAB_SIZE))
        raise UserError(
            f"{path} holds {tokens[position]} at token {first + position}, GPT-2's end at {VOCAB_SIZE - 1}: "
            f"the file is damaged or of another tokenizer; {_FETCH_AGAIN}"
        )


def write_shard(path: str | os.PathLike, tokens: Sequence[int] | np.ndarray) -> None:
    """Writes integer `tokens` [tokens] as a shard; `path` appears whole or not at all.

    Raises UserError if the file cannot be written, ValueError if there is no token, too many, or one that is
    not GPT-2's.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size <= MAX_TOKENS or tokens.dtype.kind not in "iu":
        raise ValueError(f"a shard is 1 to {MAX_TOKENS} integers in a row, not {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= VOCAB_SIZE:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()}, GPT-2's end at {VOCAB_SIZE - 1}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    write_atomically(Path(path), header.tobytes(), tokens.astype("<u2", copy=False).data)
