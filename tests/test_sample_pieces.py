"""The tokens of the bundled sample as text, and the command that writes with them, offline and without tiktoken."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import small_run

from senano_jax import sample
from senano_jax.data.bpe import read_tables
from senano_jax.data.sample import TRAIN, VAL
from senano_jax.data.sample.pieces import SamplePieces, is_sample, load_pieces, pieces_json
from senano_jax.data.shards import open_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError

GPT2_TABLES = Path(__file__).parents[1] / "data" / "gpt2"


def text_of(pieces, tokens):
    return b"".join(map(pieces.decode_single_token_bytes, tokens))


@pytest.mark.parametrize("path", [TRAIN, VAL])
def test_each_token_of_the_sample_has_its_text(path):
    pieces = load_pieces()
    tokens = np.unique(open_shard(path))
    unknown = [token for token in tokens.tolist() if pieces.decode_single_token_bytes(token).startswith(b"<|")]
    assert unknown == [END_OF_TEXT]


def test_the_text_is_english_and_comes_back_from_its_tokens():
    pieces = load_pieces()
    tokens = open_shard(VAL)[1:3000].tolist()
    text = text_of(pieces, (token for token in tokens if token != END_OF_TEXT)).decode()
    words = re.findall(r"[a-z]+", text.lower())
    assert words.count("the") > len(words) / 50
    again = pieces.encode_ordinary(text)
    assert text_of(pieces, again).decode() == text
    assert len(again) < 1.02 * len(tokens)


def test_a_text_is_made_of_the_longest_tokens_from_left_to_right():
    """By trying all of them at each place; the shorter ones fill what is left."""
    numbers = {text: n for n, text in enumerate([b"a", b"b", b"ab", b"abb", b"ba", b"\xc3", b"\xa9"])}
    pieces, rng = SamplePieces(numbers), np.random.default_rng(0)
    for _ in range(50):
        text = "".join(rng.choice(["a", "b", "é"], 12))
        rest, expected = text.encode(), []
        while rest:
            best = max((t for t in numbers if rest.startswith(t)), key=len)
            expected.append(numbers[best])
            rest = rest[len(best) :]
        assert pieces.encode_ordinary(text) == expected
    assert pieces.encode_ordinary_batch(["abba", ""]) == [[3, 0], []]


def test_every_text_can_be_written_and_other_tokens_are_seen():
    pieces = load_pieces()
    text = "".join(map(chr, range(256))) + "漢字 🙂\u2028"
    assert text_of(pieces, pieces.encode_ordinary(text)).decode() == text
    assert pieces.encode_ordinary("\ud800") == pieces.encode_ordinary("?")
    missing = next(token for token in range(50_000) if pieces.decode_single_token_bytes(token).startswith(b"<|"))
    assert pieces.decode_single_token_bytes(missing) == f"<|{missing}|>".encode()


@pytest.mark.skipif(not GPT2_TABLES.is_dir(), reason="needs GPT-2's tables in data/gpt2")
def test_the_texts_are_those_of_gpt2():
    numbers, pieces = read_tables(GPT2_TABLES), load_pieces()
    kept = {token: text for text, token in numbers.items() if pieces.decode_single_token_bytes(token) == text}
    used = np.unique(np.concatenate([open_shard(TRAIN), open_shard(VAL)])).tolist()
    assert kept.keys() == {*used, *(numbers[bytes([byte])] for byte in range(256))} - {END_OF_TEXT}
    assert pieces_json(kept) == Path(TRAIN).with_name("pieces.json").read_text(encoding="utf-8")


def test_a_run_on_the_sample_writes_text_without_tiktoken(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    run = small_run(tmp_path / "run", steps=(1,))
    [text] = sample.main([str(run), "--tokens=4", "--prompt=The  naïve 🙂"])
    printed = capsys.readouterr()
    assert printed.out == f"The  naïve 🙂{text}\n" and text
    assert printed.err == "in the tokens of the bundled sample; --bpe-dir DIR takes all of GPT-2's\n"
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(TRAIN, "elsewhere/fineweb_*.bin"))
    with pytest.raises(UserError, match="cannot import tiktoken"):
        sample.main([str(run), "--tokens=4"])


def test_the_sample_is_known_by_its_name():
    assert is_sample(TRAIN) and is_sample("/other/place/sample_train.bin")
    assert not is_sample("data/fineweb10B/fineweb_train_*.bin") and not is_sample(VAL)
