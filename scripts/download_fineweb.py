"""Downloads FineWeb, already tokenized, as the shards that the presets train and validate on.

    python scripts/download_fineweb.py            # validation and 9 training shards: 1.0B tokens, 2.0 GB
    python scripts/download_fineweb.py 103        # all of the 10B-token sample

Run it again after an interruption: whole shards are kept and a partial one is continued. HF_ENDPOINT is honoured.
published.json beside the shards keeps the checksums that the hub tells; runs copy them into their data.json.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from senano_jax.data.fineweb import (
    DATASET,
    TRAINING_SHARD,
    TRAINING_SHARDS,
    VALIDATION_SHARD,
    Published,
    add_published,
    read_published,
)
from senano_jax.data.identity import sha256_of
from senano_jax.data.shards import open_shard
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home


class Remote(NamedTuple):
    """A file of the dataset, as the hub describes it."""

    url: str  # of this version for good
    location: str  # where its bytes come from today
    size: int
    etag: str

    @property
    def sha256(self) -> str | None:
        """Large files of the hub have it as their ETag."""
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "count",
        nargs="?",
        type=int,
        default=9,
        metavar="N",
        help=f"how many training shards of 100M tokens, 1 to {TRAINING_SHARDS} (default: %(default)s)",
    )
    parser.add_argument("--dir", type=expand_home, default=Path("data/fineweb10B"), help="default: %(default)s")
    args = parser.parse_args()
    if not 1 <= args.count <= TRAINING_SHARDS:
        raise UserError(f"N is {args.count}: the dataset has training shards 1 to {TRAINING_SHARDS}")
    try:
        download(args.count, args.dir)
    except KeyboardInterrupt:
        raise UserError("interrupted: run the same command again to continue") from None


def download(count: int, folder: Path) -> None:
    """Brings the validation shard and `count` training shards into `folder`, skipping whole ones."""
    names = [VALIDATION_SHARD, *(TRAINING_SHARD.format(k + 1) for k in range(count))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --dir") from error
    tokens, hub_answers = 0, True
    for number, name in enumerate(names, start=1):
        path = folder / name
        keep = is_whole(path)
        if keep and hub_answers and name not in read_published(folder):
            try:
                keep = is_as_published(look_up(name), path)
            except UserError as error:
                hub_answers = False
                print(f"shards that are here are kept without comparing checksums: {error}", file=sys.stderr)
        if not keep:
            fetch(look_up(name), path)
        held = len(open_shard(path))
        tokens += held
        print(f"{number}/{len(names)} {path} {'kept' if keep else 'fetched'}: {held:,} tokens", flush=True)
    print(f"{len(names)} shards, {tokens:,} tokens, in {folder}")


def is_whole(path: Path) -> bool:
    """Whether a sound shard is at `path`; tells the user why one that is there is not."""
    if not path.exists():
        return False
    try:
        open_shard(path)
    except UserError as error:
        print(f"fetching again: {error}", file=sys.stderr)
        return False
    return True


def is_as_published(remote: Remote, path: Path) -> bool:
    """Whether the sound shard at `path` is the one that the hub has, as far as it tells; records it if so."""
    if remote.sha256 is None:
        return True
    digest = sha256_of(path)
    if digest != remote.sha256:
        print(f"fetching again: {path} has SHA-256 {digest}, {remote.url} has {remote.sha256}", file=sys.stderr)
        return False
    add_published(path.parent, path.name, Published(remote.url, digest))
    return True


def look_up(name: str) -> Remote:
    """What the hub says of the dataset's file `name`.

    Raises UserError for a missing package, the network, or a refusal of the server.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
    except ImportError as error:
        raise UserError(f"cannot import huggingface_hub ({error}): pip install 'huggingface_hub>=1.0'") from error
    except ValueError as error:  # it looks at its addresses when imported
        raise UserError(f"HF_ENDPOINT is {os.environ.get('HF_ENDPOINT')!r}, not an address: {error}") from error

    url = hf_hub_url(DATASET, name, repo_type="dataset")
    with one_line_failures(url, f"look up {name}"):
        found = get_hf_file_metadata(url, token=False)
    if found.size is None or found.etag is None:
        raise UserError(f"{url} comes without a size or ETag: check that HF_ENDPOINT is a Hugging Face hub")
    lasting = hf_hub_url(DATASET, name, repo_type="dataset", revision=found.commit_hash)
    return Remote(lasting, found.location, found.size, found.etag)


def fetch(remote: Remote, path: Path) -> None:
    """Downloads a file of the dataset, continuing a partial download; `path` gets only a verified shard.

    Raises UserError for the network, a refusal of the server, the disk or a damaged file.
    """
    # Not hf_hub_download: it starts a broken-off file anew, and names a file before we can look into it.
    from huggingface_hub.file_download import http_get

    with one_line_failures(remote.url, f"download {path.name} into {path.parent}"):
        # The version is in the name, so that halves of two versions are never joined.
        partial = path.with_name(f".{path.name}.{re.sub('[^0-9A-Za-z]', '', remote.etag)[:16]}.partial")
        held = partial.stat().st_size if partial.exists() else 0
        if held > remote.size:
            partial.unlink()
            held = 0
        with open(partial, "ab") as file:
            http_get(
                remote.location,
                file,
                resume_size=held,
                expected_size=remote.size,
                displayed_filename=path.name,
            )
        verify(partial, remote)
        partial.replace(path)
    if remote.sha256 is not None:
        add_published(path.parent, path.name, Published(remote.url, remote.sha256))


def verify(partial: Path, remote: Remote) -> None:
    """Deletes `partial` and raises UserError if it is not the shard that the hub has."""
    try:
        if partial.stat().st_size != remote.size:
            raise UserError(f"{partial.stat().st_size} bytes instead of {remote.size}")
        open_shard(partial)
        if remote.sha256 is not None and (digest := sha256_of(partial)) != remote.sha256:
            raise UserError(f"its SHA-256 is {digest} instead of {remote.sha256}")
    except UserError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"the download of {partial.name} is damaged and was deleted, run the same command again: {error}"
        ) from error


@contextlib.contextmanager
def one_line_failures(url: str, task: str) -> Iterator[None]:
    """UserErrors instead of what requests and the disk raise."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HTTPError as error:  # before OSError: an answer such as 404 is both
        raise UserError(explain(error, url)) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot {task} ({reason}): mend that and run the same command again to continue") from error


def explain(error: Exception, url: str) -> str:
    """One line for a failed request, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return (
            f"no answer from {url} ({type(error).__name__}: {first_line(error)}): check the network, the proxy "
            "and HF_ENDPOINT, then run the same command again to continue"
        )
    if status == 404:
        return f"{url} does not exist (404): check HF_ENDPOINT, or ask for fewer shards"
    return f"{url} was refused ({status}): wait and run the same command again to continue, or check HF_ENDPOINT"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main()
