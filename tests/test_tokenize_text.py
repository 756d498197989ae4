"""Tokenizing text files, with tables of 256 bytes and five merges in place of GPT-2's."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenize_text

from senano_jax.data.bpe import encode_all, load_bpe
from senano_jax.data.shards import find_shards, open_shard, write_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "tokenize_text.py"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]  # Ġ stands for the space


def write_tables(folder):
    """Numbers as in the published tables: visible characters first, the stand-ins of the others after them."""
    folder.mkdir()
    visible = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    symbols = visible + [chr(c) for c in range(256, 512 - len(visible))]
    tokens = symbols + [merge.replace(" ", "") for merge in MERGES]
    numbers = {token: number for number, token in enumerate(tokens)} | {"<|endoftext|>": END_OF_TEXT}
    (folder / "encoder.json").write_text(json.dumps(numbers))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def tables(tmp_path):
    return write_tables(tmp_path / "bpe")


@pytest.fixture
def tokenize(tables, tmp_path):
    def run(*args, name="n"):
        command = [sys.executable, SCRIPT, *args, "--out", tmp_path / "out", "--name", name, "--bpe-dir", tables]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def documents_in(tmp_path, pattern, tables):
    """The texts in the shards that match, in order; each must have begun with END_OF_TEXT."""
    shards = [open_shard(path) for path in find_shards(str(tmp_path / "out" / pattern))]
    tokens = np.concatenate(shards)
    assert tokens[0] == END_OF_TEXT
    pieces = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT)[1:])
    return [load_bpe(tables).decode(piece[1:].tolist()) for piece in pieces]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def assert_one_line_error(result, *words):
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_merges_are_applied_in_order_and_spaces_stay_with_their_word(tables):
    tokens = load_bpe(tables).encode_ordinary("hello world")
    assert tokens == [259, 260, *(ord(char) - 33 for char in "orld")]  # hello, Ġw, and bytes: "!" is 0


def test_every_text_comes_back(tables):
    """Characters of one to four bytes, and the name of a special token, which is text like any other."""
    encoding = load_bpe(tables)
    generator = random.Random(0)
    for text in ["", "naïve\u00a0日本 🙂\t\r\n\n  x", "<|endoftext|>", "".join(map(chr, range(1024)))] + [
        "".join(generator.choices("helo w\n'sé1 ", k=50)) for _ in range(50)
    ]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert END_OF_TEXT not in encoding.encode_ordinary(text)


@pytest.mark.parametrize("damage", ["missing", "not json", "other merges", "no end of text", "not a table"])
def test_damaged_tables_are_refused(tables, damage):
    encoder = tables / "encoder.json"
    match damage:
        case "missing":
            encoder.unlink()
        case "not json":
            encoder.write_text("{")
        case "other merges":
            (tables / "vocab.bpe").write_text("#version: 0.2\nl l\nh e\n")
        case "no end of text":
            encoder.write_text(encoder.read_text().replace("<|endoftext|>", "<|end|>"))
        case "not a table":
            encoder.write_text("[]")
    with pytest.raises(UserError, match=r"encoder\.json.*--bpe-dir"):
        load_bpe(tables)


def test_every_kind_of_file_becomes_documents_in_order(tokenize, tables, tmp_path):
    (tmp_path / "a.txt").write_text("hello\n\nworld")
    write_jsonl(tmp_path / "b.jsonl", ["one", "", "two é"])
    pq.write_table(pa.table({"id": [1, 2], "text": ["three", "four"]}), tmp_path / "c.parquet")
    result = tokenize(*(tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")), "--val-fraction", "0")
    assert result.returncode == 0, result.stderr
    assert documents_in(tmp_path, "n_train_*.bin", tables) == ["hello\n\nworld", "one", "two é", "three", "four"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["n_train_000001.bin"]


def test_no_shard_appears_before_all_are_whole(tables, tmp_path, monkeypatch):
    """Those for training come first, and the disk is full at that for validation."""

    def write(path, tokens):
        if "_val_" in path.name:
            raise UserError(f"{path} cannot be written")
        write_shard(path, tokens)

    monkeypatch.setattr(tokenize_text, "write_shard", write)
    inputs = [write_jsonl(tmp_path / "d.jsonl", ["hello world"] * 20)]
    with pytest.raises(UserError, match="cannot be written"):
        tokenize_text.tokenize(
            argparse.Namespace(
                inputs=inputs, out=tmp_path / "out", name="n", field="text", shard_tokens=200, val_fraction=0.1,
                bpe_dir=tables,
            )
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_shards_are_cut_at_the_size_asked_for_and_lose_nothing(tokenize, tables, tmp_path):
    texts = [f"document {k} " + "hello world " * (k % 7) for k in range(60)]
    result = tokenize(write_jsonl(tmp_path / "d.jsonl", texts), "--shard-tokens", "200", "--val-fraction", "0.1")
    assert result.returncode == 0, result.stderr
    train = find_shards(str(tmp_path / "out" / "n_train_*.bin"))
    assert train[0].name == "n_train_000001.bin"
    assert {len(open_shard(path)) for path in train[:-1]} == {200}
    assert len(train) > 3
    val_texts = texts[9::10]  # 1 in 10, evenly spaced
    assert documents_in(tmp_path, "n_val_*.bin", tables) == val_texts
    assert find_shards(str(tmp_path / "out" / "n_val_*.bin"))[0].name == "n_val_000000.bin"
    assert documents_in(tmp_path, "n_train_*.bin", tables) == [text for text in texts if text not in val_texts]


def test_another_field(tokenize, tables, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "no", "body": "hello"}\n\n{"body": "\\ud83d"}')
    pq.write_table(pa.table({"body": ["world"]}), tmp_path / "d.parquet")
    result = tokenize(tmp_path / "d.jsonl", tmp_path / "d.parquet", "--field", "body", "--val-fraction", "0")
    assert result.returncode == 0, result.stderr
    assert documents_in(tmp_path, "n_train_*.bin", tables) == ["hello", "\ufffd", "world"]  # half a character


def test_too_few_documents_for_a_validation_shard_are_told(tokenize, tmp_path):
    result = tokenize(write_jsonl(tmp_path / "d.jsonl", ["a", "b"]))
    assert result.returncode == 0, result.stderr
    assert "no validation shard: one document in 100" in result.stdout
    assert "raise --val-fraction to 0.5 or more" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', ["d.jsonl, line 2 is not JSON"]),
        ("d.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', ["d.jsonl, line 3 has no text in 'text'", "--field"]),
        ("d.jsonl", b'{"text": null}\n', ["d.jsonl, line 1 has no text"]),
        ("d.jsonl", b'["a"]\n', ["d.jsonl, line 1 has no text"]),
        ("d.jsonl", b'{"text": "\xff"}\n', ["d.jsonl, line 1 is not JSON", "utf-8"]),
        ("d.jsonl", b"[" * 100_000, ["d.jsonl, line 1 is not JSON"]),
        ("d.jsonl", b"", ["no text in"]),
        ("d.txt", b"one\ntwo \xff\n", ["d.txt, line 2 is not UTF-8"]),
        ("d.parquet", b"PAR1 but no more", ["d.parquet is not a sound parquet file"]),
        ("d.csv", b"a,b", ["d.csv is of an unknown kind", ".jsonl"]),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tokenize, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_one_line_error(tokenize(tmp_path / name), *words)
    assert not list(tmp_path.glob("out/*"))


def test_parquet_rows_and_columns_are_named(tokenize, tmp_path):
    pq.write_table(pa.table({"text": ["a", None], "id": [1, 2]}), tmp_path / "d.parquet")
    assert_one_line_error(tokenize(tmp_path / "d.parquet"), "d.parquet, row 2 has no text in 'text'")
    assert_one_line_error(
        tokenize(tmp_path / "d.parquet", "--field", "body"), "no column 'body' but text, id: name one with --field"
    )


def test_parquet_text_that_is_not_utf8_is_one_line(tokenize, tmp_path):
    text = pa.array([b"a\xff"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    assert_one_line_error(tokenize(tmp_path / "d.parquet"), "d.parquet is not a sound parquet file", "utf-8")


def test_arguments_that_cannot_be_are_refused_at_once(tokenize, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ["a"])
    assert_one_line_error(tokenize(path, "--val-fraction", "1"), "--val-fraction 1.0")
    assert_one_line_error(tokenize(path, "--shard-tokens", "0"), "--shard-tokens 0")
    assert_one_line_error(tokenize(path, name="a/b"), "--name 'a/b'", "--out")
    assert_one_line_error(tokenize(tmp_path / "gone.jsonl"), "gone.jsonl is not a file")
    (tmp_path / "out").write_text("in the way")
    assert_one_line_error(tokenize(path), "cannot make the folder", "--out")


def test_old_shards_are_never_mixed_with_new_ones(tokenize, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ["a"])
    assert tokenize(path).returncode == 0
    assert_one_line_error(tokenize(path), "n_train_000001.bin is already there", "--name")
    assert tokenize(path, name="m").returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_is_decoded_and_its_byte_order_mark_no_part_of_it(tokenize, tables, tmp_path, encoding):
    (tmp_path / "a.txt").write_text("hello é", encoding=encoding)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("日本", "\ufeffworld"))
    (tmp_path / "b.jsonl").write_text(lines, encoding=encoding)
    result = tokenize(tmp_path / "a.txt", tmp_path / "b.jsonl", "--val-fraction", "0")
    assert result.returncode == 0, result.stderr
    assert documents_in(tmp_path, "n_train_*.bin", tables) == ["hello é", "日本", "world"]


def test_a_million_spaces_are_encoded_in_pieces(tables):
    """As tiktoken encodes fewer at once, which fails on a million."""
    encoding = load_bpe(tables)
    for text in (f"a{' ' * 100_000} world{' ' * 250_000}", f"a{' ' * 100_000}world", "\n" * 150_000 + " he"):
        (tokens,) = encode_all(encoding, [text], ["text"])
        assert tokens == encoding.encode_ordinary(text)
    long = " " * 1_000_000
    texts = [f"a{long}world", "", "hello", long]
    encoded = encode_all(encoding, texts, list("abcd"))
    assert [encoding.decode(tokens) for tokens in encoded] == texts


def test_a_text_that_tiktoken_fails_on_is_named():
    class PanicException(BaseException):
        """As Rust code raises it: no Exception."""

    class Panics:
        def encode_ordinary(self, text):
            if text == "bad":
                raise PanicException("stack\noverflow")
            return [1]

        def encode_ordinary_batch(self, texts, num_threads):
            return [self.encode_ordinary(text) for text in texts]

    with pytest.raises(UserError, match=r"b\.jsonl, line 2: tiktoken fails on these 3 characters \(stack overflow\)"):
        encode_all(Panics(), ["good", "bad"], ["b.jsonl, line 1", "b.jsonl, line 2"])


def test_what_fails_late_leaves_no_shard(tokenize, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ["hello"] * 500)
    with path.open("a") as file:
        file.write('{"text": null}\n')
    assert_one_line_error(
        tokenize(path, "--shard-tokens", "10"), "line 501 has no text in 'text' but null: mend or delete"
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_single_document_is_cut_for_validation(tokenize, tables, tmp_path):
    text = "".join(f"{k} hello world\n" for k in range(1000))
    (tmp_path / "input.txt").write_text(text)
    result = tokenize(tmp_path / "input.txt")
    assert result.returncode == 0, result.stderr
    (train,), (val,) = (documents_in(tmp_path, f"n_{split}_*.bin", tables) for split in ("train", "val"))
    assert train + val == text
    assert 0.009 < len(val) / len(text) < 0.011


def test_names_and_globs_are_taken_as_they_are(tokenize, tables, tmp_path, monkeypatch):
    """No name is a format; a quoted glob, and `~`, reach the script as they were typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in [1]").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in [1]" / name).write_text(name)
    result = tokenize("~/in [1]/*.txt", "--val-fraction", "0", name="{x}%s")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["{x}%s_train_000001.bin"]
    assert documents_in(tmp_path, "{x}%s_train_*.bin", tables) == ["a.txt", "b.txt"]


def test_without_tables_or_network_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(UserError, match=r"cannot download the GPT-2 tables \(ProxyError\).*--bpe-dir"):
        load_bpe()
