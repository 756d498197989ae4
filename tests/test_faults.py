"""Full disks, vanishing and damaged files: each ends a run in one line, and nothing that was saved is lost."""

import json
import os
import resource
import signal
import subprocess
import threading
import zipfile

import kept_programs
import numpy as np
import pytest
from tiny_flags import SMALL, STEPS

from senano_jax import train
from senano_jax.config_file import read_config, write_config
from senano_jax.data import stream as stream_module
from senano_jax.data.shards import HEADER_BYTES, Shard, find_shards, open_shard, write_shard
from senano_jax.data.stream import SequenceSource, TokenStream
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import read_torch_checkpoint
from senano_jax.presets import demo
from senano_jax.runlog.writer import RunFolder
from senano_jax.training.checkpoint import Checkpoints

one_trace = kept_programs.one_trace  # for all tests here


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train.bin"
    write_shard(path, np.arange(20_000) % 50_000)
    return path


def mounted(folder, options):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, "size=8m")  # for two checkpoints of the small model and no third
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def read_only_disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, "size=1m,ro")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_read_only_disk_is_refused_before_training(read_only_disk):
    with pytest.raises(UserError, match=r"cannot be written .*Read-only file system") as caught:
        train.main([*SMALL, f"--run-dir={read_only_disk / 'run'}"])
    one_line(caught)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run cannot be written") as caught:
        train.main([*SMALL, f"--run-dir={tmp_path / 'run'}"])
    one_line(caught)


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with (
        pytest.raises(UserError, match="checkpoints cannot be used for checkpoints"),
        Checkpoints(tmp_path / "checkpoints"),
    ):
        pass


def test_a_disk_that_is_full_during_a_save_keeps_the_earlier_checkpoint(small_disk):
    """And with room made, the run goes on."""
    flags = [*SMALL, f"--run-dir={small_disk / 'run'}"]
    with pytest.raises(
        UserError, match=r"could not be saved in .*earlier checkpoints are whole: make room and resume"
    ) as e:
        train.main(flags)
    one_line(e)
    whole = [p.name for p in (small_disk / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert whole, "what was saved before is kept"
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    train.main([*flags, "--resume"])
    with Checkpoints(small_disk / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [STEPS, STEPS - 1]


def log_for_long(folder, hard_limit):
    with RunFolder(folder) as run:
        run.go_on({"metrics": 0, "log": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard_limit))
        for step in range(1000):
            run.metric(step=step)


def test_a_disk_that_is_full_during_logging_ends_in_one_line(tmp_path):
    """A limit on the file size stands in for it: both fail the write with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)") as caught:
            log_for_long(tmp_path, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    one_line(caught)
    with RunFolder(tmp_path) as run:  # what a resumed run does: cut to the last whole line it knows, and go on
        run.go_on({"metrics": len('{"step": 0}\n'), "log": 0})
        run.metric(step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_shard_that_is_deleted_while_in_use_can_still_be_read(shard):
    source = SequenceSource([shard], 100)
    shard.unlink()
    np.testing.assert_array_equal(source[150], np.arange(15_000, 15_101))


def test_a_shard_that_shrinks_while_in_use_is_named(shard):
    """A memory map would have killed the process."""
    source, tokens = SequenceSource([shard], 100), Shard(shard)
    os.truncate(shard, HEADER_BYTES + 2 * 10_000)
    np.testing.assert_array_equal(source[0], np.arange(101))
    np.testing.assert_array_equal(tokens.read(9_990, 10_000), np.arange(9_990, 10_000))
    for read in (lambda: source[99], lambda: source[150], lambda: tokens.read(9_999, 10_001)):
        with pytest.raises(
            UserError, match=rf"{shard} was cut short while it was in use: .* of 20000; delete"
        ) as caught:
            read()
        one_line(caught)


def test_a_shard_that_shrinks_ends_the_stream_where_it_is_short(shard):
    with_stream = TokenStream([shard], 100, 4)
    try:
        os.truncate(shard, HEADER_BYTES + 2 * 10_000)
        with pytest.raises(UserError, match=r"is cut short: 20000 tokens in its header"):
            list(with_stream)
        assert 0 < with_stream.get_state()["next_token"] < 10_000
    finally:
        with_stream.close()


def test_tokens_read_are_those_of_the_memory_map(shard):
    tokens, mapped = Shard(shard), open_shard(shard)
    assert len(tokens) == len(mapped)
    for first, end in ((0, 0), (0, 1), (7, 19_999), (0, 20_000)):
        read = tokens.read(first, end)
        np.testing.assert_array_equal(read, mapped[first:end])
        assert read.dtype == mapped.dtype


def test_an_input_output_error_is_told_in_one_line(shard, monkeypatch):
    tokens = Shard(shard)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(UserError, match=rf"cannot read the shard {shard} any more \(Input/output error\)"):
        tokens.read(0, 5)


def test_an_error_in_a_reading_thread_reaches_the_run(monkeypatch, tmp_path):
    """Not a stream that ends early, nor one that waits for ever; what was saved before is whole."""
    seen, real = [], stream_module.check_tokens

    def fail(path, tokens, first):
        if threading.current_thread() is not threading.main_thread() and first > 500:
            seen.append(first)
            raise RuntimeError("out of order")
        real(path, tokens, first)

    monkeypatch.setattr(stream_module, "check_tokens", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        train.main([*SMALL, "--micro-batches=1", f"--run-dir={tmp_path / 'run'}"])
    assert seen
    with RunFolder(tmp_path / "run"):  # its lock is free again
        pass


def test_more_devices_than_there_are_is_refused_on_resume(tmp_path):
    run = train.main([*SMALL, "--checkpoint-every=0", f"--run-dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="--devices 9: this machine has 8 cpu devices"):
        train.main([*SMALL, "--checkpoint-every=0", "--devices=9", f"--run-dir={run}", "--resume"])


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_what_is_no_name_of_a_file_is_refused(name):
    pytest.importorskip("torch")
    for read in (open_shard, Shard, read_torch_checkpoint, lambda name: find_shards(f"{name}/*.bin")):
        with pytest.raises(UserError) as caught:
            read(name)
        one_line(caught)


def test_a_number_too_large_for_a_float_is_refused_by_field(tmp_path):
    write_config(tmp_path / "config.json", demo(), "demo", 1)
    document = json.loads((tmp_path / "config.json").read_text())
    document["optimizer"]["matrices"]["rate"] = 10**400
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"optimizer\.matrices\.rate is '1000.*'; restore the file") as caught:
        read_config(tmp_path / "config.json")
    one_line(caught)


def test_tensors_that_need_gradients_are_read_and_other_kinds_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pt")
    np.testing.assert_array_equal(read_torch_checkpoint(str(tmp_path / "a.pt"))["a"], np.ones(3))
    for tensor in (torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(1).bfloat16().expand(1 << 40)):
        torch.save({"a": tensor}, tmp_path / "b.pt")
        with pytest.raises(UserError, match="entry 'a' is not a tensor that the file holds the elements of"):
            read_torch_checkpoint(str(tmp_path / "b.pt"))


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    old, new = zipfile.ZipFile(tmp_path / "a.pt"), zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED)
    with old, new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match=r"b\.pt cannot be read .*: its members are compressed"):
        read_torch_checkpoint(str(tmp_path / "b.pt"))
