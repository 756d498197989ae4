"""GPT-2's byte-pair encoding, run by tiktoken, from its own download or from a folder with the published tables."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT_NAME = "<|endoftext|>"
# Contractions, then words, numbers and other signs with the space before them, then the spaces that are left.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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


def read_tables(folder: Path) -> dict[bytes, int]:
    """Token bytes to token number, which is also the order of merging, from the published tables in `folder`.

    Raises UserError if a table cannot be read or the two do not belong together.
    """
    encoder_path, merges_path = folder / "encoder.json", folder / "vocab.bpe"
    byte_of = {character: byte for byte, character in enumerate(_characters())}
    try:
        numbers = json.loads(encoder_path.read_text(encoding="utf-8"))
        merges = merges_path.read_text(encoding="utf-8").split("\n")[1:]  # after the version
        if numbers.pop(END_OF_TEXT_NAME) != END_OF_TEXT:
            raise ValueError(f"{END_OF_TEXT_NAME} is not {END_OF_TEXT}")
        ranks = {bytes(byte_of[char] for char in token): number for token, number in numbers.items()}
        merged = [bytes(byte_of[char] for char in merge.replace(" ", "")) for merge in merges if merge]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename} ({error.strerror}): --bpe-dir takes a folder with encoder.json and vocab.bpe"
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


def _characters() -> list[str]:
    """The character that stands in the tables for each byte: itself where visible in Latin-1, else from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]
