"""Full disks, vanishing files, signals: each ends a run in one line, and nothing that was saved is lost."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from senano_jax import train
from senano_jax.config import LayerSchedule
from senano_jax.config_file import read_config, write_config
from senano_jax.data import stream as stream_module
from senano_jax.data.shards import HEADER_BYTES, Shard, find_shards, open_shard, write_shard
from senano_jax.data.stream import SequenceSource, TokenStream
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import read_torch_checkpoint
from senano_jax.presets import demo
from senano_jax.runlog.writer import RunFolder
from senano_jax.training import loop
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.stop import StopRequest

SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    "--steps=12", "--batch-tokens=256", "--seq-len=256", "--final-window-tokens=256",
    "--data.val-tokens=256", "--data.val-seq-len=256", "--val-every=0", "--devices=1", "--checkpoint-every=1",
]  # fmt: skip


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
    mounted(folder, "size=10m")  # a checkpoint of the small model takes 4 MB
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
        assert checkpoints.steps() == [12, 11]


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
        if threading.current_thread() is not threading.main_thread() and first > 2000:
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


SLOW_STEP = """
import os, sys, time
from senano_jax import train
from senano_jax.errors import one_line_errors
from senano_jax.training import loop

real = loop.place_batch
count = [0]
def place(*args):
    count[0] += 1
    if count[0] == 3:
        print("READY", flush=True)
        {wait}
    return real(*args)
loop.place_batch = place
with one_line_errors():
    train.main(sys.argv[1:])
"""


def slow_run(run, wait, *flags, before=()):
    """A run whose third step does `wait`, and has come to it."""
    command = [*before, sys.executable, "-c", SLOW_STEP.format(wait=wait), *SMALL, f"--run-dir={run}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "READY" in line:
            return process
    raise AssertionError(process.wait())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_the_second_ends_at_once(number, tmp_path):
    run = tmp_path / "run"

    def start(wait, *flags):
        return slow_run(run, wait, *flags)

    first = start("time.sleep(1)")
    first.send_signal(number)
    said, _ = first.communicate(timeout=100)
    assert first.returncode == 0
    assert f"{number.name}: stopped after step" in said and f"--run-dir {run} --resume" in " ".join(said.split())
    saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert saved and saved[-1] < 12, "nothing but whole checkpoints"

    second = start("while True: time.sleep(0.01)", "--resume")
    second.send_signal(number)
    time.sleep(0.2)
    assert second.poll() is None, "the first signal lets the step finish"
    second.send_signal(number)
    second.communicate(timeout=100)
    assert second.returncode == 128 + number
    train.main([*SMALL, f"--run-dir={run}", "--resume"])
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [12, 11]


def test_a_closed_terminal_saves_however_often_it_is_told(tmp_path):
    """The kernel and the shell both tell; SIGTERM may follow, as from a session that ends."""
    process = slow_run(tmp_path / "run", "time.sleep(1)")
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.15)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "SIGHUP: stopped after step" in said
    assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) < 12


def test_a_run_under_nohup_does_not_mind_a_closed_terminal(tmp_path):
    process = slow_run(tmp_path / "run", "time.sleep(0.5)", before=["nohup"])
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "step:12/12 val_loss" in said


def test_a_signal_is_answered_while_python_cannot_run_its_handler(tmp_path):
    """A compilation takes minutes in one call; C's sleep stands for it."""
    process = slow_run(tmp_path / "run", "import ctypes; ctypes.CDLL(None).sleep(3)")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: finishing the step under way, then saving" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # two at once may be one that two programs pass on
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_run_goes_on_without_its_screen(tmp_path):
    process = slow_run(tmp_path / "run", "time.sleep(0.1)")
    process.stdout.close()  # standard error goes the same way
    assert process.wait(timeout=100) == 0
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [12, 11]
    assert "step:12/12 val_loss" in (tmp_path / "run" / "log.txt").read_text()


def test_a_sweep_stops_where_a_run_was_stopped(tmp_path, monkeypatch):
    """The function saves like the command, and then raises what no `except Exception` takes."""
    config = dataclasses.replace(
        demo(), steps=12, run_dir=str(tmp_path / "run"), val_every=0, devices=1, batch_tokens=1024, seq_len=256,
        final_window_tokens=256, data=dataclasses.replace(demo().data, val_tokens=1024, val_seq_len=512),
        model=dataclasses.replace(demo().model, dim=16, layers=LayerSchedule(1, 0, 0, 1)),
    )  # fmt: skip
    real, signals = loop.place_batch, iter([signal.SIGINT])

    def interrupted(*args):
        for number in signals:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "place_batch", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT: the run in .*run was stopped and is saved") as caught:
        loop.train(config, "demo")
    assert caught.value.run_dir == tmp_path / "run"
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert 0 < checkpoints.steps()[0] < 12


def test_a_run_in_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def ask():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [before]


def test_signals_are_handled_only_while_training():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
