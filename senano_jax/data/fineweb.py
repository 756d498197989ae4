"""The published FineWeb shards: their names, and the checksums that were published with those on this machine.

`scripts/download_fineweb.py` leaves `published.json` beside the shards: for each one the address it was published at
and the SHA-256 that the hub tells for that address, an object {NAME: {"url", "sha256"}}.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from senano_jax.errors import UserError
from senano_jax.files import write_atomically

DATASET = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
VALIDATION_SHARD = "fineweb_val_000000.bin"
TRAINING_SHARD = "fineweb_train_{:06d}.bin"  # from 1
CHECKSUMS = "published.json"
MAX_BYTES = 1 << 20


class Published(NamedTuple):
    """What was published under the name of a shard."""

    url: str  # with the commit of the dataset
    sha256: str  # of the whole file, 64 hexadecimal digits


def read_published(folder: Path) -> dict[str, Published]:
    """The published checksums of the shards in `folder` by their names; none where the file is missing.

    Raises UserError if it is not what the download script writes.
    """
    path = folder / CHECKSUMS
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_BYTES + 1))
        published = {name: Published(**entry) for name, entry in document.items()}
        sound = all(isinstance(p.url, str) and re.fullmatch("[0-9a-f]{64}", p.sha256) for p in published.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; delete it and run scripts/download_fineweb.py again")
    return published


def add_published(folder: Path, name: str, published: Published) -> None:
    """Records what was published as `name`, beside the shards. Raises UserError if it cannot be written."""
    entries = {**read_published(folder), name: published}
    document = {name: entry._asdict() for name, entry in sorted(entries.items())}
    write_atomically(folder / CHECKSUMS, (json.dumps(document, indent=1) + "\n").encode())
