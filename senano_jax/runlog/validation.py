"""What a run was validated on: losses on other text, or on more of it, cannot be compared."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple


class Text(NamedTuple):
    """One shard of validation text."""

    name: str
    sha256: str | None  # None where it is not known

    def may_be(self, other: "Text") -> bool:
        """Whether both can be one file: by their checksums, or by their names where one is not known."""
        if None in (self.sha256, other.sha256):
            return self.name == other.name
        return self.sha256 == other.sha256


@dataclass(frozen=True)
class Validation:
    """The text and how many tokens of it; None for what a log does not say. The length of the sequences, the context
    that a prediction has, is a system's own."""

    texts: tuple[Text, ...] | None
    tokens: int | None

    def difference(self, other: "Validation") -> str | None:
        """How `other` is known to differ from this, in words; None if it may be the same."""
        if None not in (self.texts, other.texts):
            for own, its in zip_longest(self.texts, other.texts):
                if own is None or its is None or not own.may_be(its):
                    return f"on {_names(other.texts)}, not on {_names(self.texts)}"
        if None not in (self.tokens, other.tokens) and self.tokens != other.tokens:
            return f"on {other.tokens:,} tokens, not {self.tokens:,}"
        return None


def _names(texts: tuple[Text, ...]) -> str:
    """The names, each with the beginning of its checksum."""
    return ", ".join(t.name + (f" ({t.sha256[:8]})" if t.sha256 else "") for t in texts) or "nothing"
