"""Turns text into shards: GPT-2 tokens, <|endoftext|> in front of each document.

    python scripts/tokenize_text.py corpus/*.jsonl --out data/mine --name mine

A .txt file is one document, a .jsonl file has one in each line, a .parquet file one in each row. Shards come out as
NAME_train_000001.bin and so on, and NAME_val_000000.bin and so on; every document lies in one of the two wholly.
"""

import argparse
import glob
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from senano_jax.data.bpe import load_bpe
from senano_jax.data.shards import MAX_TOKENS, write_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError, one_line_errors

GROUP_CHARACTERS = 1_000_000  # encoded in one call, which spreads the documents over threads
REPORT_SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s INPUT... [options]"
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".txt, .jsonl or .parquet files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--name", required=True, help="what the names of the shards begin with")
    parser.add_argument("--field", default="text", help="JSON field or parquet column (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents, evenly spaced, for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--bpe-dir", type=Path, metavar="DIR", help="folder with encoder.json and vocab.bpe (default: downloaded)"
    )
    args = parser.parse_args()
    with one_line_errors():
        try:
            tokenize(args)
        except KeyboardInterrupt:
            raise UserError(f"interrupted: delete {args.out}/{args.name}_*.bin and start again") from None


def tokenize(args: argparse.Namespace) -> None:
    """Streams the documents of `args.inputs` into shards. Raises UserError for whatever cannot be used."""
    check_arguments(args)
    encoding = load_bpe(args.bpe_dir)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.out} ({error.strerror}): choose another --out") from error
    for split in ("train", "val"):
        for present in args.out.glob(f"{glob.escape(args.name)}_{split}_*.bin"):
            raise UserError(f"{present} is already there: delete the old shards or choose another --name")

    train = ShardWriter(args.out, args.name + "_train_{:06d}.bin", 1, args.shard_tokens)
    val = ShardWriter(args.out, args.name + "_val_{:06d}.bin", 0, args.shard_tokens)
    documents, started = 0, time.monotonic()
    reported = started
    every_document = (text for path in args.inputs for text in read_documents(path, args.field) if text)
    for texts in group(every_document, GROUP_CHARACTERS):
        for tokens in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1):
            goes_to_val = int((documents + 1) * args.val_fraction) > int(documents * args.val_fraction)
            (val if goes_to_val else train).add([END_OF_TEXT, *tokens])
            documents += 1
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            speed = (train.tokens + val.tokens) / (reported - started)
            print(f"{documents:,} documents, {train.tokens + val.tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, args.inputs))}: give files with documents")
    train.close()
    val.close()
    print(f"{documents:,} documents: {train.tokens:,} tokens for training, {val.tokens:,} for validation")
    if args.val_fraction and not val.tokens:
        print(f"no validation shard: one document in {1 / args.val_fraction:.0f} goes there, raise --val-fraction")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for what can be known to be wrong before the work starts."""
    if not 0 <= args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction} is not a share from 0 to below 1")
    if not 1 <= args.shard_tokens <= MAX_TOKENS:
        raise UserError(f"--shard-tokens {args.shard_tokens} is not from 1 to {MAX_TOKENS}")
    if "/" in args.name or not args.name:
        raise UserError(f"--name {args.name!r} is not the beginning of a file name: give the folder with --out")
    for path in args.inputs:
        if path.suffix not in READERS:
            raise UserError(f"{path} is of an unknown kind: give {', '.join(READERS)} files")
        if not path.is_file():
            raise UserError(f"{path} is not a file: check its name")


class ShardWriter:
    """Cuts a stream of tokens into shards of `shard_tokens` tokens, the last one shorter, numbered on."""

    def __init__(self, folder: Path, name_format: str, number: int, shard_tokens: int):
        self.tokens = 0  # taken in so far
        self._folder = folder
        self._name_format = name_format
        self._number = number
        self._buffer = np.empty(shard_tokens, np.uint16)
        self._filled = 0

    def add(self, tokens: list[int]) -> None:
        self.tokens += len(tokens)
        while tokens:
            room = len(self._buffer) - self._filled
            piece, tokens = tokens[:room], tokens[room:]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            if self._filled == len(self._buffer):
                self.close()

    def close(self) -> None:
        """Writes what has gathered, if anything, as the next shard."""
        if self._filled:
            path = self._folder / self._name_format.format(self._number)
            write_shard(path, self._buffer[: self._filled])
            print(f"{path}: {self._filled:,} tokens", flush=True)
            self._number += 1
            self._filled = 0


def group(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of consecutive texts that have at least `characters` characters together (but for the last list)."""
    gathered, size = [], 0
    for text in texts:
        gathered.append(text)
        size += len(text)
        if size >= characters:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The documents of one file, streamed. Raises UserError naming the file and the line or row that is unusable."""
    try:
        yield from READERS[path.suffix](path, field)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): check that it is whole") from error


def read_txt(path: Path, field: str) -> Iterator[str]:
    content = path.read_bytes()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 (byte {error.start}): convert the file") from error


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except (ValueError, RecursionError) as error:  # a ValueError also for what is not UTF-8
                raise UserError(f"{path}, line {number} is not JSON ({error}): mend or delete the line") from error
            if not isinstance(document, dict) or not isinstance(document.get(field), str):
                raise UserError(f"{path}, line {number} has no text in {field!r}: name the field with --field")
            yield document[field]


def read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow ({error}): pip install 'pyarrow>=18'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {field!r} but {columns}: name one with --field")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{path}, row {row} has no text in {field!r}: name the column with --field")
                    yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a sound parquet file ({str(error).splitlines()[0]}): fetch it again") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}

if __name__ == "__main__":
    main()
