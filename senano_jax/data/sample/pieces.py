"""The tokens of the bundled sample as text, so that what a run on it writes can be read without GPT-2's tables."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from senano_jax.data.bpe import characters
from senano_jax.data.sample import PIECES, TRAIN


class SamplePieces:
    """Does what `sample` asks of a tiktoken.Encoding, with the tokens that the sample has and all single bytes.

    A text is made of the longest tokens that fit, from its left to its right, which are not always those of GPT-2's
    encoding.
    """

    def __init__(self, numbers: dict[bytes, int]):
        self._numbers = numbers
        self._texts = {number: text for text, number in numbers.items()}
        self._longest = max(map(len, numbers))

    def encode_ordinary(self, text: str) -> list[int]:
        """The tokens of `text`, none of which is END_OF_TEXT."""
        rest, tokens, at = text.encode("utf-8", "replace"), [], 0
        while at < len(rest):
            ends = range(min(at + self._longest, len(rest)), at, -1)
            end = next(end for end in ends if rest[at:end] in self._numbers)
            tokens.append(self._numbers[rest[at:end]])
            at = end
        return tokens

    def encode_ordinary_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """The tokens of each text; threads would not help."""
        return [self.encode_ordinary(text) for text in texts]

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The text of a token of the sample, and `<|number|>` for any other one."""
        return self._texts.get(token, b"<|%d|>" % token)


def is_sample(train_files: str) -> bool:
    """Whether a run that reads these files reads the bundled sample, in this installation or in another one."""
    return Path(train_files).name == Path(TRAIN).name


@functools.cache
def load_pieces() -> SamplePieces:
    """Those in the package."""
    byte_of = {character: byte for byte, character in enumerate(characters())}
    numbers = json.loads(Path(PIECES).read_text(encoding="utf-8"))
    return SamplePieces({bytes(byte_of[char] for char in token): number for token, number in numbers.items()})


def pieces_json(texts: dict[int, bytes]) -> str:
    """What the package has as pieces.json: the text of each token as GPT-2's encoder.json writes it, and its number."""
    character = characters()
    numbers = {"".join(character[byte] for byte in texts[token]): token for token in sorted(texts)}
    return json.dumps(numbers, ensure_ascii=False, separators=(",", ":")) + "\n"
