"""Which token each token of GPT-2's vocabulary begins with."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from senano_jax.data.bpe import read_tables
from senano_jax.errors import UserError

NONE = -1


def read_prefixes(folder: str, vocab_size: int) -> Int32[np.ndarray, "V"]:
    """The table of `longest_prefixes` for the published tables in `folder`, encoder.json and vocab.bpe.

    Raises UserError if they cannot be read, or have a token that is none of the vocabulary.
    """
    numbers = read_tables(Path(folder), "--data.bpe-dir")
    if max(numbers.values()) >= vocab_size:
        raise UserError(
            f"--data.bpe-dir {folder} has tokens up to {max(numbers.values())}, --model.vocab-size is {vocab_size}; "
            "give the tables of the model's own vocabulary"
        )
    return longest_prefixes(numbers, vocab_size)


def longest_prefixes(numbers: Mapping[bytes, int], vocab_size: int) -> Int32[np.ndarray, "V"]:
    """For each token the longest other one that its bytes begin with, or NONE: single bytes have none, nor has what is
    no text. `numbers` are those of the tokens, by their bytes."""
    table = np.full(vocab_size, NONE, np.int32)
    for text, number in numbers.items():
        shorter = (text[:length] for length in range(len(text) - 1, 0, -1))
        table[number] = next((numbers[start] for start in shorter if start in numbers), NONE)
    return table
