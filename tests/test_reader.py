"""Every kind of log is read to the same figures, and a damaged one ends in one line that says where and why."""

import json
import math
import os
import random
from pathlib import Path

import pytest

from senano_jax.errors import UserError
from senano_jax.runlog import log_lines
from senano_jax.runlog.curves import ValidationPoint, difference_curve, loss_at, mean_curve, time_at, tokens_to_loss
from senano_jax.runlog.log_lines import MAX_LINE_BYTES
from senano_jax.runlog.published import PUBLISHED
from senano_jax.runlog.reader import read_log

LOG = """\
import os
def main():
        print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{t:.0f}ms")
# step:3/4 val_loss:3.0 is what the last run printed
====
step:0/4 val_loss:10.8258 train_time:0ms step_avg:nanms tokens:0.00M
step:1/4 train_time:110ms step_avg:110.00ms
step:2/4 val_loss:5.5000 train_time:200ms step_avg:100.00ms tokens:1.00M
step:3/4 train_loss:4.1 train_time:310ms step_avg:103.33ms
step:4/4 val_loss:4.0000 train_time:420ms step_avg:105.00ms tokens:2.00M
peak memory allocated: 17476 MiB
"""
CONFIG = {
    "preset": "tiny",
    "steps": 4,
    "batch_tokens": 500,
    "seq_len": 100,
    "seed": 7,
    "run_dir": "here",
    "model": {"dim": 64},
    "parameters": 1234,
}
POINTS = [(0, 0, 10.8, 0.0), (2, 1000, 5.5, 200.0), (4, 2000, 4.0, 420.0)]


def write_log(folder: Path, text: str | bytes, name: str = "run.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_run(folder: Path, *, points=POINTS, devices=("H100", "H100"), **changes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "environment.json").write_text(json.dumps({"devices": devices, "git": {"commit": "abc"}}))
    records = []
    for step, tokens, loss, time in points:
        if step:
            records.append({"step": step, "tokens_trained": tokens, "tokens_read": tokens, "loss": loss, "lr": 1.0})
        records.append({"step": step, "tokens_trained": tokens, "val_loss": loss, "train_time_ms": time, "window": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_published_record():
    log = read_log("published:recurrent")
    assert len(log.points) == 15
    assert log.final == (1700, 668_470_000, 3.2701, 6_555_576)
    assert (log.tokens_trained, log.tokens_read, log.parameters) == (668_470_000, 752_025_600, 162_165_555)
    assert log.complete
    assert log.implementation == "PyTorch"
    # between 638.98M tokens at 3.2862 and 668.47M at 3.2701
    by_hand = 638.98 * (668.47 / 638.98) ** ((3.2862 - 3.28) / (3.2862 - 3.2701))
    assert tokens_to_loss(log.points, 3.28) / 1e6 == pytest.approx(by_hand)
    assert by_hand == pytest.approx(650.18, abs=0.005)


def test_unknown_published_name_lists_the_known_ones():
    with pytest.raises(UserError, match="published:recurrent"):
        read_log("published:nothing")


def test_published_files_are_there():
    for published in PUBLISHED.values():
        assert published.path.is_file()


def test_torch_log_between_a_dumped_program_and_other_text(tmp_path):
    log = read_log(write_log(tmp_path, LOG))
    assert log.points == ((0, 0, 10.8258, 0), (2, 10**6, 5.5, 200), (4, 2 * 10**6, 4.0, 420))
    assert [(point.step, point.loss, point.train_time_ms) for point in log.train_points] == [
        (1, None, 110),
        (3, 4.1, 310),
    ]
    assert (log.name, log.steps_total, log.tokens_read, log.complete, log.notes) == ("run", 4, None, True, ())


def test_older_spellings_and_line_ends(tmp_path):
    text = "step:0/4 val_loss:9.0 train_time:0.000s step_avg:nanms\r\nstep:4/4 val_loss:4 train_time:1.5s\r\n"
    log = read_log(write_log(tmp_path, b"\xef\xbb\xbf" + text.encode()), tokens_per_step=1000)
    assert log.points == ((0, 0, 9.0, 0), (4, 4000, 4.0, 1500))


def test_a_log_without_tokens_asks_for_them(tmp_path):
    path = write_log(tmp_path, "step:4/4 val_loss:4.0 train_time:1ms step_avg:1.00ms\n")
    with pytest.raises(UserError, match=r"line 1.*--tokens-per-step"):
        read_log(path)


def test_run_folder(tmp_path):
    log = read_log(write_run(tmp_path / "a"))
    assert log.points == tuple(POINTS)
    assert (log.name, log.seed, log.parameters, log.hardware) == ("tiny", 7, 1234, "2 x H100")
    assert (log.tokens_trained, log.tokens_read, log.steps_total, log.complete) == (2000, 2000, 4, True)
    assert [point.loss for point in log.train_points] == [5.5, 4.0]
    assert read_log(tmp_path / "a" / "metrics.jsonl") == log


def test_only_the_seed_and_the_place_may_differ_within_a_group(tmp_path):
    keys = [
        read_log(write_run(tmp_path / str(index), **changes)).group_key
        for index, changes in enumerate([{}, {"seed": 8, "run_dir": "there"}, {"model": {"dim": 65}}])
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_running_log_is_not_complete(tmp_path):
    assert not read_log(write_run(tmp_path / "a", points=POINTS[:2])).complete
    assert not read_log(write_log(tmp_path, LOG.replace("/4 ", "/9 "))).complete


def test_a_last_line_cut_anywhere_is_passed_over_or_whole(tmp_path):
    """A killed writer may stop after any byte: no cut may give another loss or another token count."""
    whole = read_log(write_log(tmp_path, LOG))
    start = LOG.index("step:4/4")
    end = LOG.index("\n", start)
    for cut in range(start, end + 1):
        log = read_log(write_log(tmp_path, LOG[:cut]))
        assert log.points == whole.points[: len(log.points)]
        assert len(log.points) == 3 or log.notes or cut <= start + len("step:")
    run = write_run(tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text()
    start = metrics.rindex("{")
    for cut in range(start + 1, len(metrics) - 1):
        (run / "metrics.jsonl").write_text(metrics[:cut])
        log = read_log(run)
        assert log.points == tuple(POINTS[:2])
        assert "cut off" in log.notes[0]


def test_csv(tmp_path):
    log = read_log(write_log(tmp_path, "tokens,val_loss,comment\n1000,5.5,a\n\n2000,4.0,b\n", "read-off.csv"))
    assert log.points == ((None, 1000, 5.5, None), (None, 2000, 4.0, None))
    with pytest.raises(UserError, match=r"line 1.*tokens and val_loss"):
        read_log(write_log(tmp_path, "a,b\n1,2\n", "other.csv"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("val_loss:5.5000", "val_loss:nan", "line 8: val_loss is 'nan', not a finite number"),
        ("val_loss:5.5000", "val_loss:-5.5", "line 8: val_loss is negative"),
        ("val_loss:5.5000", "val_loss:5.5e300", "line 8: val_loss is 5.5e\\+300, which no run reaches"),
        ("val_loss:5.5000 ", "val_loss:5.5000", "line 8: not a complete step line"),
        ("step:2/4 val", "xxxx:2/4 val", "line 8: not a complete step line"),
        ("step:2/4", "step:5/4", "line 8: step 5 of 4"),
        ("step:2/4", "step:2/5", "line 8: a run of 5 steps, in a log of 4 steps"),
        ("step:2/4", "step:0/4", "line 8: evaluation of step 0 after that of step 0"),
        ("step:3/4 train", "step:1/4 train", "line 9: step 1 after step 1"),
        ("tokens:2.00M", "tokens:0.50M", "line 10: tokens fall from 1000000 to 500000"),
        (" tokens:2.00M", "", "line 10: no tokens: field"),
        ("time:420ms", "time:42ms", "line 10: train_time falls from 200 to 42 ms"),
        ("time:420ms", "time:-420ms", "line 10: train_time_ms is negative"),
        ("====", "\0", "line 5: a zero byte"),
        ("====", "=" * (MAX_LINE_BYTES + 1), "line 5: longer than"),
        (LOG, "step by step, nothing\n", "no validation loss"),
        (LOG, "", "no validation loss"),
    ],
)
def test_damaged_torch_logs_say_where_and_why(tmp_path, old, new, reason):
    path = write_log(tmp_path, LOG.replace(old, new))
    with pytest.raises(UserError, match=reason) as caught:
        read_log(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"val_loss": 5.5', '"val_loss": NaN', "line 3: val_loss is nan, not a finite number"),
        ('"val_loss": 5.5', '"val_loss": null', "line 3: val_loss is 'None', not a finite number"),
        ('"val_loss": 5.5', '"val_loss": true', "line 3: val_loss is 'True', not a finite number"),
        ('"val_loss": 5.5', '"val_loss": -1', "line 3: val_loss is negative"),
        (
            '"tokens_trained": 1000, "val',
            '"tokens_trained": 1000.5, "val',
            "line 3: tokens_trained is 1000.5, not a whole",
        ),
        ('"tokens_trained": 1000, "val', '"val', "line 3: tokens_trained is 'None'"),
        ('"tokens_trained": 1000, "val', f'"tokens_trained": 1{"0" * 400}, "val', "line 3: tokens_trained is 1e\\+300"),
        (
            '{"step": 2, "tokens_trained": 1000, "val',
            '{"step": 0, "tokens_trained": 1000, "val',
            "line 3: evaluation of",
        ),
        (
            '{"step": 4, "tokens_trained": 2000, "tok',
            '{"step": 9, "tokens_trained": 2000, "tok',
            "line 4: step 9, in a run",
        ),
        ('"window": 1}\n{"step": 4', '"window": 1\n{"step": 4', "line 3: not a JSON object"),
        ('{"step": 0', "[" * 50_000 + '{"step": 0', "line 1: not a JSON object"),
        ('{"step": 0', "7\n" + '{"step": 0', "line 1: not a JSON object"),
    ],
)
def test_damaged_metrics_say_where_and_why(tmp_path, old, new, reason):
    run = write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    assert old in text
    (run / "metrics.jsonl").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=reason) as caught:
        read_log(run)
    assert "metrics.jsonl" in str(caught.value)


def test_damaged_configuration(tmp_path):
    run = write_run(tmp_path / "run", steps="many")
    with pytest.raises(UserError, match=r"config.json: steps is 'many'"):
        read_log(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not a JSON object"):
        read_log(run)
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read_log(run)


def test_what_is_no_log_at_all(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_log(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="is not a path"):
        read_log("")
    with pytest.raises(UserError, match="not a regular file"):
        read_log("/dev/null")
    with pytest.raises(UserError, match="cannot be read"):
        read_log("x" * 5000)
    with pytest.raises(UserError, match="not UTF-8"):
        read_log(write_log(tmp_path, b"step:1/4 \xff\xfe\n"))


def test_a_huge_file_is_refused_without_being_read(tmp_path, monkeypatch):
    path = write_log(tmp_path, LOG)
    os.truncate(path, 1 << 40)  # sparse: a terabyte of zeros after the log
    with pytest.raises(UserError, match="longer than"):
        read_log(path)
    monkeypatch.setattr(log_lines, "MAX_FILE_BYTES", 1 << 20)
    path.write_bytes((b"x" * 60_000 + b"\n") * 20)
    with pytest.raises(UserError, match="line 18: the file is larger than 1 MiB"):
        read_log(path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One random injury of a file."""
    at, to = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    lines = data.split(b"\n")
    match rng.randrange(8):
        case 0:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 40) :]
        case 3:
            return data[:to] + data[at:to] + data[to:]
        case 4:
            return data[:at] + rng.randbytes(rng.randrange(1, 30)) + data[at:]
        case 5:
            rng.shuffle(lines)
            return b"\n".join(lines)
        case 6:
            line = rng.randrange(len(lines))
            return b"\n".join(lines[:line] + lines[line + 1 :])
        case _:
            word = rng.choice(
                [b"nan", b"-1", b"1e999", b"9" * 6000, b"null", b"{}", b"[]", b'"', b"", b"\r", b"Infinity"]
            )
            return data[:at] + word + data[at + rng.randrange(6) :]


def assert_sound(log) -> None:
    assert log.points
    tokens = [point.tokens for point in log.points]
    assert tokens == sorted(tokens)
    for point in log.points:
        assert math.isfinite(point.val_loss)
        assert point.val_loss >= 0
        assert point.tokens >= 0


def test_injured_logs_are_refused_or_read_soundly(tmp_path):
    rng = random.Random(0)
    published = PUBLISHED["recurrent"].path.read_bytes()
    run = write_run(tmp_path / "run")
    originals = {name: (run / name).read_bytes() for name in ("config.json", "environment.json", "metrics.jsonl")}
    csv = b"step,tokens,val_loss,train_time_ms\n1,1000,5.5,10\n2,2000,4.0,\n"
    refusals = []
    for _ in range(600):
        name = rng.choice(["published", "csv", *originals])
        if name == "published":
            path = write_log(tmp_path, mutate(published, rng))
        elif name == "csv":
            path = write_log(tmp_path, mutate(csv, rng), "points.csv")
        else:
            path = run
            (run / name).write_bytes(mutate(originals[name], rng))
        try:
            assert_sound(read_log(path))
        except UserError as error:
            refusals.append(str(error))
        finally:
            if path is run:
                (run / name).write_bytes(originals[name])
    assert not any("\n" in refusal for refusal in refusals)
    assert 200 < len(refusals) < 550  # the injuries bite, and not every one is fatal


def points(*pairs: tuple[int, float]) -> list[ValidationPoint]:
    return [ValidationPoint(None, tokens, loss, float(tokens)) for tokens, loss in pairs]


def test_interpolation_is_linear_in_log_tokens():
    curve = points((0, 11.0), (100, 5.0), (10_000, 3.0))
    assert loss_at(curve, 1000) == pytest.approx(4.0)
    assert tokens_to_loss(curve, 4.0) == pytest.approx(1000)
    assert tokens_to_loss(curve, 3.0) == pytest.approx(10_000)
    assert tokens_to_loss(curve, 2.999) is None
    assert tokens_to_loss(curve, 8.0) == pytest.approx(50)  # before the first evaluation: linear in the tokens
    assert tokens_to_loss(curve, 12.0) == 0
    assert loss_at(curve, 50) is None
    assert loss_at(curve, 10_001) == 3.0  # within the rounding of a log
    assert loss_at(curve, 10_100) is None
    assert time_at(curve, 5050) == pytest.approx(5050)


def test_the_target_is_reached_the_first_time():
    assert tokens_to_loss(points((100, 5.0), (200, 3.0), (300, 3.5), (400, 2.0)), 3.2) < 200
    assert tokens_to_loss(points((100, 5.0), (100, 3.0)), 3.2) == 100


def test_mean_and_difference_stay_within_all_runs(tmp_path):
    first = read_log(write_run(tmp_path / "a"))
    second = read_log(write_run(tmp_path / "b", points=[(0, 0, 10.0, 0.0), (2, 1000, 5.0, 100.0)]))
    assert mean_curve([first, second]) == [(None, 1000, 5.25, 150.0)]
    assert difference_curve(second.points, first.points) == [(1000, pytest.approx(-0.5))]
