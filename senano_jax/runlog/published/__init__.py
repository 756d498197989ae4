"""Published curves to compare with: `published:NAME` wherever a log is expected."""

from dataclasses import dataclass
from pathlib import Path

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
}
