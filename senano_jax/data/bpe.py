"""GPT-2's byte-pair encoding, run by tiktoken, from its own download or from a folder with the published tables."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.files import expand_home

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT_NAME = "<|endoftext|>"
PUBLISHED = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # both tables
# Contractions, then words, numbers and other signs with the space before them, then the spaces that are left.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LONGEST_SPACE = 100_000  # characters that tiktoken's regular expression is given in a row; half a million overflow it
# What Rust's \s and Python's have in common: Python's has the separators of ASCII too.
_LONG_SPACE = re.compile(rf"[^\S\x1c-\x1f]{{{_LONGEST_SPACE + 1},}}")


def load_bpe(folder: Path | None = None) -> "tiktoken.Encoding":
    """The GPT-2 encoding: from `encoder.json` and `vocab.bpe` in `folder`, or else from tiktoken's cache or download.

    Raises UserError without tiktoken, the network or sound tables.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"cannot import tiktoken ({error}): pip install 'tiktoken>=0.9'") from error
    if folder is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # what it downloads with has OSErrors only
            raise UserError(
                f"tiktoken cannot download the GPT-2 tables ({type(error).__name__}): check the network, "
                "or give --bpe-dir, a folder with encoder.json and vocab.bpe"
            ) from error
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=_PIECES,
        mergeable_ranks=read_tables(folder),
        special_tokens={END_OF_TEXT_NAME: END_OF_TEXT},
    )


def encode_all(
    encoding: "tiktoken.Encoding", texts: Sequence[str], names: Sequence[str], threads: int = 1
) -> list[list[int]]:
    """The tokens of each text, none of which is END_OF_TEXT.

    White space of more than 100,000 characters is encoded piece by piece: where it is not of single tokens, they can
    differ at the borders. Raises UserError with its name for a text that tiktoken fails on.
    """
    pieces = [list(_pieces(text)) for text in texts]
    try:
        encoded = iter(encoding.encode_ordinary_batch(list(chain.from_iterable(pieces)), num_threads=threads))
    except BaseException as error:
        if not _is_panic(error):
            raise
        for text, name in zip(texts, names):
            _try_alone(encoding, text, name)
        raise
    return [list(chain.from_iterable(islice(encoded, len(of_text)))) for of_text in pieces]


def _try_alone(encoding: "tiktoken.Encoding", text: str, name: str) -> None:
    try:
        for piece in _pieces(text):
            encoding.encode_ordinary(piece)
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise UserError(
            f"{name}: tiktoken fails on these {len(text):,} characters ({' '.join(str(error).split())[:100]}); "
            "shorten or leave them out"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """A failure of Rust code is no Exception, and its class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut where the encoding has a border anyway, and long white space in pieces."""
    done = 0
    for space in _LONG_SPACE.finditer(text) if len(text) > _LONGEST_SPACE else ():
        end = space.end() if space.end() == len(text) else space.end() - 1  # the last belongs to the word behind it
        for border in (*range(space.start(), end, _LONGEST_SPACE), end):
            if border > done:
                yield text[done:border]
                done = border
    if done < len(text) or not text:
        yield text[done:]


def read_tables(folder: Path) -> dict[bytes, int]:
    """Token bytes to token number, which is also the order of merging, from the published tables in `folder`.

    Raises UserError if a table cannot be read or the two do not belong together.
    """
    folder = expand_home(folder)
    encoder_path, merges_path = folder / "encoder.json", folder / "vocab.bpe"
    byte_of = {character: byte for byte, character in enumerate(characters())}
    try:
        numbers = json.loads(encoder_path.read_text(encoding="utf-8-sig"))
        merges = merges_path.read_text(encoding="utf-8").split("\n")[1:]  # after the version
        if numbers.pop(END_OF_TEXT_NAME) != END_OF_TEXT:
            raise ValueError(f"{END_OF_TEXT_NAME} is not {END_OF_TEXT}")
        ranks = {bytes(byte_of[char] for char in token): number for token, number in numbers.items()}
        merged = [bytes(byte_of[char] for char in merge.replace(" ", "")) for merge in merges if merge]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename} ({error.strerror}): --bpe-dir takes a folder with encoder.json and "
            f"vocab.bpe, from {PUBLISHED}"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{encoder_path} and {merges_path} are not GPT-2's tables ({type(error).__name__}: {error}): "
            "give --bpe-dir the published ones"
        ) from error
    in_order = sorted(ranks, key=ranks.__getitem__)
    if len(in_order) != 256 + len(merged) or in_order[256:] != merged or len(set(ranks.values())) != len(ranks):
        raise UserError(f"{encoder_path} and {merges_path} do not belong together: give --bpe-dir matching ones")
    return ranks


def characters() -> list[str]:
    """The character that stands in the tables for each byte: itself where visible in Latin-1, else from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]
