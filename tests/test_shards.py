"""The shard format: what is written is read back, and every damage is told in one line naming the file."""

import os
import subprocess
import sys

import numpy as np
import pytest

from senano_jax.data import shards
from senano_jax.data.shards import HEADER_BYTES, MAGIC, find_shards, open_shard, write_shard
from senano_jax.data.stream import SequenceSource
from senano_jax.data.vocabulary import VOCAB_SIZE
from senano_jax.errors import UserError


def shard_bytes(count=5, magic=MAGIC, version=1, tokens=range(5)):
    header = np.zeros(shards.HEADER_INTS, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_written_tokens_are_read_back(tmp_path):
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=1000)
    write_shard(tmp_path / "a.bin", tokens)
    read = open_shard(tmp_path / "a.bin")
    np.testing.assert_array_equal(read, tokens)
    assert read.dtype == np.uint16
    assert not read.flags.writeable


def test_the_bytes_are_the_published_format(tmp_path):
    write_shard(tmp_path / "a.bin", [0, 1, 2, 3, 4])
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes()


@pytest.mark.parametrize("tokens", [[], [VOCAB_SIZE], [-1], [0.5], [[1]]], ids=str)
def test_what_is_not_tokens_is_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"integers in a row|GPT-2"):
        write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path):
    """A limit on the file size stands in for a full disk: both fail the write with an OSError."""
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3])
    script = (
        "import resource, sys\n"
        "from senano_jax.data.shards import write_shard\n"
        "from senano_jax.errors import one_line_errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with one_line_errors(): write_shard(sys.argv[1], [7] * 10_000)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}: cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(open_shard(path), [1, 2, 3])


def test_a_write_into_no_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"missing/a\.bin: cannot be written"):
        write_shard(tmp_path / "missing" / "a.bin", [1])


def test_shards_are_found_in_name_order(tmp_path):
    for name in ("b_000002.bin", "b_000010.bin", "b_000001.bin", "other.bin"):
        write_shard(tmp_path / name, [1])
    found = find_shards(str(tmp_path / "b_*.bin"))
    assert [path.name for path in found] == ["b_000001.bin", "b_000002.bin", "b_000010.bin"]


def test_a_pattern_without_a_match_names_itself_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"nothing_\*\.bin.*download_fineweb\.py"):
        find_shards(str(tmp_path / "nothing_*.bin"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (shard_bytes()[: HEADER_BYTES - 1], "too short"),
        (shard_bytes(magic=MAGIC + 1), "not a shard"),
        (shard_bytes(version=2), "version 2"),
        (shard_bytes(count=0, tokens=[]), "holds 0 tokens"),
        (shard_bytes(count=-5), "holds -5 tokens"),
        (shard_bytes(count=2**31 - 1), "cut short"),
        (shard_bytes(count=6), "cut short"),
        (shard_bytes(count=4), "too long"),
        (shard_bytes() + b"\0", "too long"),
        (shard_bytes()[:-1], "cut short"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_reason(tmp_path, content, reason):
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} .*{reason}") as caught:
        open_shard(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_a_pipe_are_user_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    for path, reason in [
        (tmp_path / "gone.bin", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe.bin", "not a regular file"),
    ]:
        with pytest.raises(UserError, match=rf"{path}.*{reason}"):
            open_shard(path)


def test_an_unreadable_file_is_a_user_error(tmp_path, monkeypatch):
    """Permissions do not bind root, who often runs the tests, so a refusing `open` stands in."""
    path = tmp_path / "a.bin"
    write_shard(path, [1])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=rf"{path} \(Permission denied\)"):
        open_shard(path)


def damage(rng, content):
    """One random accident: a flipped bit, a header field, a cut, a tail, or a hole of zeros."""
    content = bytearray(content)
    at = int(rng.integers(len(content)))
    match rng.integers(6):
        case 0:
            content[at] ^= 1 << int(rng.integers(8))
        case 1:
            field = 4 * int(rng.integers(3))
            content[field : field + 4] = rng.bytes(4)
        case 2:
            content[int(rng.integers(12))] ^= 1 << int(rng.integers(8))
        case 3:
            del content[at:]
        case 4:
            content += rng.bytes(int(rng.integers(1, 50)))
        case 5:
            content[at : at + 16] = bytes(len(content[at : at + 16]))
    return bytes(content)


def expected_tokens(content):
    """What a whole shard of these bytes holds, or None: the format, said once more and differently."""
    if len(content) < 1024 or len(content) % 2:
        return None
    tokens = [int.from_bytes(content[i : i + 2], "little") for i in range(1024, len(content), 2)]
    head = [int.from_bytes(content[i : i + 4], "little", signed=True) for i in (0, 4, 8)]
    sound = head == [20240520, 1, len(tokens)] and len(tokens) > 0 and max(tokens) < 50257
    return tokens if sound else None


def test_every_random_damage_is_a_user_error_or_still_a_valid_shard(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "fuzzed.bin"
    refused = 0
    for _ in range(500):
        size = int(rng.integers(2, 60))
        content = damage(rng, shard_bytes(count=size, tokens=rng.integers(VOCAB_SIZE, size=size)))
        path.write_bytes(content)
        expected = expected_tokens(content)
        if expected is None or len(expected) < 2:
            refused += 1
            with pytest.raises(UserError, match=str(path)):
                read_all(path)
        else:
            np.testing.assert_array_equal(read_all(path), expected)
    assert 100 < refused < 450  # both outcomes are exercised


def read_all(path):
    source = SequenceSource([path], 1)
    return [source[0][0]] + [source[k][1] for k in range(len(source))]
