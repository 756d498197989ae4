"""data.json of a run folder: the shards that a run reads, so that nobody has to believe what they were."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from senano_jax.config_file import parse
from senano_jax.data.identity import ShardIdentity, identify, sha256_of
from senano_jax.errors import UserError
from senano_jax.files import read_json_object, write_atomically

FILE = "data.json"
PARTS = ("train", "val")
Shards = Mapping[str, Sequence[ShardIdentity]]  # for each of PARTS, in the order they are read


class DataRecord:
    """Writes data.json, {"train": [shard, ...], "val": [...]}: once at the start of a run without checksums, and again
    when a thread has computed them, so that training does not wait.

    A context manager; only process 0 of a job reads and writes anything. `paths` are the shards that the run needs of
    each part. Raises UserError, at the latest from `wait`, for a shard that cannot be read.
    """

    def __init__(self, folder: Path, paths: Mapping[str, Sequence[Path]]):
        self._file, self._paths = folder / FILE, paths
        import jax  # who reads such a file does without

        self._active = jax.process_index() == 0
        self._shards = {part: identify(paths[part]) for part in PARTS} if self._active else {}
        self._written: Future | None = None
        self._leaving = False

    def __enter__(self) -> "DataRecord":
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_) -> None:
        self._leaving = True
        self._thread.shutdown(cancel_futures=True)

    def start(self) -> None:
        """For a new run."""
        if self._active:
            write_data(self._file, self._shards)
            self._written = self._thread.submit(self._write_checksums)

    def go_on(self, say: Callable[[str], None], steps_done: int) -> None:
        """For a resumed run: whatever it was going to read must be what it was, or tokens are repeated or left out.

        Compares names and sizes, then checksums; says so where there are none of the shards of the `steps_done`.
        Raises UserError naming the first shard that differs.
        """
        if not self._active:
            return
        recorded = read_data(self._file.parent)
        if recorded is None:
            say(f"{self._file} is missing: that the shards are those of the beginning is not checked")
            return
        self._compare(recorded, self._shards)
        if any(shard.sha256 is None for part in PARTS for shard in recorded[part]):
            if steps_done:  # the checksums failed; stopped before its first checkpoint, a run does all steps again
                say(f"{self._file} has no checksums: that the shards are those of the beginning is not fully checked")
            self.start()
        else:
            self._compare(recorded, self._with_checksums())

    def wait(self) -> None:
        """Returns when the checksums are on disk. A checkpoint is saved after that: what resumes can be checked."""
        if self._written is not None:
            self._written.result()

    def _write_checksums(self) -> None:
        complete = self._with_checksums()
        if not self._leaving:
            write_data(self._file, complete)

    def _with_checksums(self) -> Shards:
        return {part: list(map(self._with_checksum, self._shards[part], self._paths[part])) for part in PARTS}

    def _with_checksum(self, shard: ShardIdentity, path: Path) -> ShardIdentity:
        return shard if self._leaving else dataclasses.replace(shard, sha256=sha256_of(path))

    def _compare(self, recorded: Shards, found: Shards) -> None:
        for part in PARTS:
            for number, (old, new) in enumerate(zip(recorded[part], found[part]), start=1):
                for field in ("name", "bytes", "tokens", "sha256"):
                    before, now = getattr(old, field), getattr(new, field)
                    if now is not None and before not in (None, now):
                        raise UserError(
                            f"--resume: {part} shard {number}, {self._paths[part][number - 1]}, has {field} {now}, the "
                            f"run was started with {before} ({self._file}); give it the shards it was started with"
                        )
            if len(recorded[part]) != len(found[part]):
                raise UserError(
                    f"--resume: the run needs {len(found[part])} {part} shards and was started with "
                    f"{len(recorded[part])} ({self._file}); give it the shards it was started with"
                )


def write_data(file: Path, shards: Shards) -> None:
    """Writes data.json, whole or not at all. Raises UserError if it cannot be written."""
    document = {part: [dataclasses.asdict(shard) for shard in shards[part]] for part in PARTS}
    write_atomically(file, (json.dumps(document, indent=1) + "\n").encode())


def read_data(folder: Path) -> Shards | None:
    """The shards of the run in `folder`; None if it has no data.json. Raises UserError for a damaged one."""
    file = folder / FILE
    if not file.exists():
        return None
    document = read_json_object(file)
    shards = {}
    for part in PARTS:
        if not isinstance(entries := document.get(part), list):
            raise UserError(f"{file}: {part} is not a list of shards; restore the file the run wrote")
        shards[part] = [parse(ShardIdentity, entry, file, f"{part}[{k}]") for k, entry in enumerate(entries)]
    return shards
