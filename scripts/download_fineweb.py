"""Downloads FineWeb, already tokenized, as the shards that the presets train and validate on.

    python scripts/download_fineweb.py            # validation and 9 training shards: 1.0B tokens, 2.0 GB
    python scripts/download_fineweb.py 103        # all of the 10B-token sample

Run it again after an interruption: whole shards are kept and a partial one is continued. HF_ENDPOINT is honoured.
"""

import argparse
import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

from senano_jax.data.shards import open_shard
from senano_jax.errors import UserError, one_line_errors

DATASET = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
VALIDATION_SHARD = "fineweb_val_000000.bin"
TRAINING_SHARD = "fineweb_train_{:06d}.bin"  # from 1


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
    parser.add_argument("--dir", type=Path, default=Path("data/fineweb10B"), help="default: %(default)s")
    args = parser.parse_args()
    with one_line_errors():
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
    tokens = 0
    for number, name in enumerate(names, start=1):
        path = folder / name
        verb = "kept" if is_whole(path) else "fetched"
        if verb == "fetched":
            fetch(name, path)
        held = len(open_shard(path))
        tokens += held
        print(f"{number}/{len(names)} {path} {verb}: {held:,} tokens", flush=True)
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


def fetch(name: str, path: Path) -> None:
    """Downloads the dataset's file `name`, continuing a partial download; `path` gets only a verified shard.

    Raises UserError for a missing package, the network, a refusal of the server, the disk or a damaged file.
    """
    try:
        # Not hf_hub_download: it starts a broken-off file anew, and names a file before we can look into it.
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.file_download import http_get
    except ImportError as error:
        raise UserError(f"cannot import huggingface_hub ({error}): pip install 'huggingface_hub>=1.0'") from error
    except ValueError as error:  # it looks at its addresses when imported
        raise UserError(f"HF_ENDPOINT is {os.environ.get('HF_ENDPOINT')!r}, not an address: {error}") from error

    url = hf_hub_url(DATASET, name, repo_type="dataset")
    try:
        remote = get_hf_file_metadata(url, token=False)
        if remote.size is None or remote.etag is None:
            raise UserError(f"{url} comes without a size or ETag: check that HF_ENDPOINT is a Hugging Face hub")
        # The version is in the name, so that halves of two versions are never joined.
        partial = path.with_name(f".{name}.{re.sub('[^0-9A-Za-z]', '', remote.etag)[:16]}.partial")
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
                displayed_filename=name,
            )
        verify(partial, remote.size, remote.etag)
        partial.replace(path)
    except HTTPError as error:  # before OSError: an answer such as 404 is both
        raise UserError(explain(error, url)) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"cannot download {name} into {path.parent} ({reason}): "
            "mend that and run the same command again to continue"
        ) from error


def verify(partial: Path, size: int, etag: str) -> None:
    """Deletes `partial` and raises UserError if it is not the shard that the hub has."""
    try:
        if partial.stat().st_size != size:
            raise UserError(f"{partial.stat().st_size} bytes instead of {size}")
        open_shard(partial)
        if re.fullmatch("[0-9a-f]{64}", etag):  # large files of the hub have their SHA-256 as ETag
            with open(partial, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != etag:
                raise UserError(f"its SHA-256 is {digest} instead of {etag}")
    except UserError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"the download of {partial.name} is damaged and was deleted, run the same command again: {error}"
        ) from error


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
    main()
