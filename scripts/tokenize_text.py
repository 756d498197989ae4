"""Turns text into shards: GPT-2 tokens, <|endoftext|> in front of each document.

    python scripts/tokenize_text.py corpus/*.jsonl --out data/mine --name mine

A .txt file is one document, a .jsonl file has one in each line, a .parquet file one in each row. Shards come out as
NAME_train_000001.bin and so on, and NAME_val_000000.bin and so on, all at the end; every document lies in one of the
two wholly, but for a single one, whose end is for validation. UTF-16 and UTF-32 are known by their byte order mark.
"""

import argparse
import codecs
import glob
import itertools
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from senano_jax.data.bpe import encode_all, load_bpe
from senano_jax.data.shards import MAX_TOKENS, write_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand, expand_home

if TYPE_CHECKING:
    import tiktoken

GROUP_CHARACTERS = 1_000_000  # encoded in one call, which spreads the documents over threads
REPORT_SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s INPUT... [options]"
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".txt, .jsonl or .parquet files, or globs of them")
    parser.add_argument("--out", type=expand_home, required=True, metavar="DIR", help="folder for the shards")
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
    tables = "folder with encoder.json and vocab.bpe (default: downloaded)"
    parser.add_argument("--bpe-dir", type=expand_home, metavar="DIR", help=tables)
    args = parser.parse_args()
    args.inputs = [path for given in args.inputs for path in expand(given) or [expand_home(given)]]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # else unfinished shards stay
    try:
        tokenize(args)
    except KeyboardInterrupt:
        raise UserError("interrupted: no shard was written, start again") from None


def tokenize(args: argparse.Namespace) -> None:
    """Streams the documents of `args.inputs` into shards, which appear when all are whole.

    Raises UserError for whatever cannot be used.
    """
    check_arguments(args)
    encoding = load_bpe(args.bpe_dir)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.out} ({error.strerror}): choose another --out") from error
    for split in ("train", "val"):
        for present in args.out.glob(f"{glob.escape(args.name)}_{split}_*.bin"):
            raise UserError(f"{present} is already there: delete the old shards or choose another --name")
    try:
        place = tempfile.TemporaryDirectory(dir=args.out, prefix=".unfinished-")
    except OSError as error:
        raise UserError(f"cannot write into {args.out} ({error.strerror}): choose another --out") from error
    with place as unfinished:
        train = ShardWriter(Path(unfinished), f"{args.name}_train_", 1, args.shard_tokens)
        val = ShardWriter(Path(unfinished), f"{args.name}_val_", 0, args.shard_tokens)
        documents = deal(args, encoding, train, val)
        for writer in (train, val):
            writer.close()
        for path, tokens in (*train.written, *val.written):  # only now that all are whole
            path.replace(args.out / path.name)
            print(f"{args.out / path.name}: {tokens:,} tokens")
    print(f"{documents:,} documents: {train.tokens:,} tokens for training, {val.tokens:,} for validation")
    if args.val_fraction and not val.tokens:
        enough = math.ceil(1000 / documents) / 1000
        print(
            f"no validation shard: one document in {1 / args.val_fraction:.0f} goes there, raise --val-fraction "
            f"to {enough:g} or more"
        )


def deal(args: argparse.Namespace, encoding: "tiktoken.Encoding", train: "ShardWriter", val: "ShardWriter") -> int:
    """Encodes all documents, and gives each to one of the two writers; a single one is cut in two. Returns their
    number. Raises UserError if there is none."""
    documents, single = 0, []
    reported = started = time.monotonic()
    texts = (document for path in args.inputs for document in read_documents(path, args.field) if document.text)
    for batch in group(texts, GROUP_CHARACTERS):
        names = [document.place for document in batch]
        encoded = encode_all(encoding, [document.text for document in batch], names, threads=os.cpu_count() or 1)
        for tokens in encoded:
            if documents == 0:
                single = tokens  # perhaps
            elif documents == 1:
                train.add([END_OF_TEXT, *single])
            if documents:
                goes_to_val = int((documents + 1) * args.val_fraction) > int(documents * args.val_fraction)
                (val if goes_to_val else train).add([END_OF_TEXT, *tokens])
            documents += 1
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            speed = (train.tokens + val.tokens) / (reported - started)
            print(f"{documents:,} documents, {train.tokens + val.tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, args.inputs))}: give files with documents")
    if documents == 1:
        end = len(single) - (math.ceil(args.val_fraction * len(single)) if len(single) > 1 else 0)
        train.add([END_OF_TEXT, *single[:end]])
        if end < len(single):
            val.add([END_OF_TEXT, *single[end:]])
    return documents


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

    def __init__(self, folder: Path, name: str, number: int, shard_tokens: int):
        self.tokens = 0  # taken in so far
        self.written: list[tuple[Path, int]] = []  # shards and their tokens
        self._folder = folder
        self._name = name
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
            path = self._folder / f"{self._name}{self._number + len(self.written):06d}.bin"
            write_shard(path, self._buffer[: self._filled])
            self.written.append((path, self._filled))
            self._filled = 0


class Document(NamedTuple):
    place: str  # for messages: the file, and the line or row in it
    text: str


def group(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Lists of consecutive documents that have at least `characters` characters together (but for the last list)."""
    gathered, size = [], 0
    for document in documents:
        gathered.append(document)
        size += len(document.text)
        if size >= characters:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def read_documents(path: Path, field: str) -> Iterator[Document]:
    """The documents of one file, streamed, without byte order marks. Raises UserError naming the file and the line or
    row that is unusable."""
    try:
        for document in READERS[path.suffix](path, field):
            yield document._replace(text=document.text.removeprefix("\ufeff"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): check that it is whole") from error


def encoding_of(path: Path) -> str:
    """UTF-8, unless the file begins with the byte order mark of another."""
    with open(path, "rb") as file:
        begins = file.read(4)
    if begins in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if begins[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"


def read_txt(path: Path, field: str) -> Iterator[Document]:
    content, encoding = path.read_bytes(), encoding_of(path)
    try:
        yield Document(str(path), content.decode(encoding))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} is not {encoding.upper()} (byte {error.start}): convert the file"
        ) from error


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    encoding = encoding_of(path)
    # Bytes, if they are UTF-8: each line is decoded, and named, by itself.
    with open(path, "rb") if encoding == "utf-8" else open(path, encoding=encoding, newline="\n") as file:
        for number in itertools.count(1):
            place = f"{path}, line {number}"
            try:
                line = file.readline()
                if not line:
                    return
                if not line.strip():
                    continue
                document = json.loads(line)
            except (ValueError, RecursionError) as error:  # a ValueError also for what cannot be decoded
                raise UserError(f"{place} is not JSON ({error}): mend or delete the line") from error
            yield Document(place, text_in(document, field, place, "line", "field"))


def text_in(document: object, field: str, place: str, part: str, kind: str) -> str:
    """The text in a `field`. Raises UserError if there is none, and where."""
    if not isinstance(document, dict) or field not in document:
        raise UserError(f"{place} has no text in {field!r}: name the {kind} with --field")
    if not isinstance(document[field], str):
        found = json.dumps(document[field], default=str)[:40]
        raise UserError(
            f"{place} has no text in {field!r} but {found}: mend or delete the {part}, or name another {kind} with "
            "--field"
        )
    return document[field]


def read_parquet(path: Path, field: str) -> Iterator[Document]:
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
                    place = f"{path}, row {row}"
                    yield Document(place, text_in({field: text}, field, place, "row", "column"))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a sound parquet file ({str(error).splitlines()[0]}): fetch it again") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}

if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main()
