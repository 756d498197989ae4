"""Published curves to compare with: `published:NAME` wherever a log is expected."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from senano_jax.data.fineweb import VALIDATION_SHARD
from senano_jax.runlog.validation import Text, Validation


@dataclass(frozen=True)
class Published:
    """One published run and what its log does not say itself."""

    file: str
    parameters: int
    tokens_read: int
    hardware: str
    validation: Validation
    source: str
    tokens_per_step: int | None = None
    """For a log that does not count tokens."""

    @property
    def path(self) -> Path:
        """The log, which the package contains."""
        return Path(__file__).with_name(self.file)


PUBLISHED = {
    # Its loader fetches one micro-batch of 2 x 24,576 tokens more a step than it trains on: 1,700 x 442,368 tokens.
    "recurrent": Published(
        file="torch-recurrent-668M.txt",
        parameters=162_165_555,
        tokens_read=752_025_600,
        hardware="2 x RTX 4090",
        validation=Validation((Text(VALIDATION_SHARD, None),), 10_485_760),
        source="github.com/lapp0/sample-efficient-nanogpt, log 83dda42f",
    ),
    "value-embeddings": Published(
        file="torch-value-embeddings-696M.txt",
        parameters=275_598_388,
        tokens_read=695_992_320,
        hardware="8 x NVIDIA H100 80GB HBM3",
        validation=Validation((Text(VALIDATION_SHARD, None),), 10_485_760),
        source="github.com/KellerJordan/modded-nanogpt, 2025-05-25_EvenFasterReduce, log 6ae86d05",
        tokens_per_step=393_216,
    ),
}


class HistoryRow(NamedTuple):
    """A row of the record table."""

    name: str
    """The preset that it is."""
    tokens: int


def record_history() -> list[HistoryRow]:
    """All rows, also those of which no curve was published."""
    rows = json.loads(Path(__file__).with_name("records.json").read_text(encoding="utf-8"))
    return [HistoryRow(row["preset"], row["tokens"]) for row in rows]
