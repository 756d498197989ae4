"""Logs of other programs: orders of fields, what stands before a line, dialects, several runs in a file, divergence."""

import json
from pathlib import Path

import pytest

from senano_jax.errors import UserError
from senano_jax.runlog.log_lines import MAX_LINE_BYTES
from senano_jax.runlog.reader import read_log, read_logs

LINES = [f"step:{k}/3 val_loss:{5 - k}.{k}000 train_time:{k}00ms step_avg:100.00ms tokens:{k}.00M" for k in range(4)]
POINTS = [(k, k * 10**6, 5 - k + k / 10, k * 100) for k in range(4)]


def write(folder: Path, lines: list[str], name: str = "run.txt", end: str = "\n") -> Path:
    path = folder / name
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


@pytest.mark.parametrize(
    "line",
    [
        "step:2/3 val_loss:3.2000 val_bpb:1.20 train_time:200ms step_avg:100.00ms",
        "step:2/3 train_time:0.2s val_loss:3.2000",
        "step:2/3 lr:1.0e-3 val_avg_loss:1.0 train_time:200ms (swa on) val_loss:3.2000 val_ema_loss:1.0 handoff:none",
        "val_loss:3.2000 step:2/3 train_time:200ms",
        "step: 2/3 val_loss: 3.2000, train_time: 200ms",
        "step:2/3 | val_loss:3.2000 | train_time:200ms | best val_loss:3.1",
        "best_val_loss:9.0 step:2/3 val_loss:3.2000 train_time:200ms",
    ],
)
def test_fields_in_any_order_between_fields_nobody_knows(tmp_path, line):
    lines = [f"step:{k}/3 val_loss:{5 - k} train_time:{k}00ms" for k in range(4)]
    log = read_log(write(tmp_path, [*lines[:2], line, lines[3]]), tokens_per_step=1000)
    assert log.points[2] == (2, 2000, 3.2, 200)
    assert len(log.points) == 4 and log.complete and log.notes == ()


@pytest.mark.parametrize(
    "before",
    [
        "[rank0]: ", "0: ", "2026-01-01 00:00:00,123 INFO train.py:12] ", "\x1b[32m", "\x1b[1;32mINFO\x1b[0m ", "[32m",
        " 67%|######7   | 2/3 [00:01<00:00,  1.50it/s]", "100%|##########| 3/3", "10%|#20%|##", "## | ", "INFO:root:",
        "node-3 | ", "67%|██▋ | 2/3 ", "val_loss=9.1 ", "50%|#5 | 1/2 [loss:2.0]\r100%|##########| 2/2\r", "(trainer) ",
    ],
)  # fmt: skip
def test_what_stands_before_a_line_is_passed_over(tmp_path, before):
    log = read_log(write(tmp_path, [before + line + "\x1b[0m" for line in LINES]))
    assert log.points == tuple(POINTS)
    assert log.notes == ()


def test_a_long_progress_bar_is_no_long_line(tmp_path):
    bar = "".join(f"\r{k % 100:3d}%|####      | {k}/5000" for k in range(6000))
    assert len(bar) > 2 * MAX_LINE_BYTES
    log = read_log(write(tmp_path, [bar + "\r" + line for line in LINES]))
    assert log.points == tuple(POINTS)
    with pytest.raises(UserError, match="line 2: not a complete step line"):
        read_log(write(tmp_path, [LINES[0], bar + "\rstep:1/3 val_loss:4 train_time:1"]))


def test_a_comment_is_no_evaluation_and_one_that_looks_like_one_is_told(tmp_path):
    log = read_log(write(tmp_path, ["# step:3/3 val_loss:0.1 in the last run", f"# {LINES[3]}", *LINES[:3]]))
    assert log.final.step == 2
    assert log.notes == ("line 2: an evaluation in a comment (#) was passed over",)


def test_evaluations_after_training_have_no_step(tmp_path):
    extra = ["final_int8_roundtrip val_loss:9.5 val_bpb:1.3 eval_time:71ms", "quantized val_loss:9.6"]
    log = read_log(write(tmp_path, [*LINES, *extra]))
    assert log.points == tuple(POINTS)
    assert log.notes == ("line 5: a validation loss without a step was passed over (2 such lines)",)


def test_lines_of_steps_that_nobody_knows_are_passed_over(tmp_path):
    others = ["warmup_step:1/20", "step:1000 churn:0.1", "tail_ema step:2 taus:[1]", "step:1/3 loss:2.0 t:3ms"]
    assert read_log(write(tmp_path, [*others, *LINES, *others])).points == tuple(POINTS)


def test_a_run_that_stops_early_is_complete(tmp_path):
    lines = [line.replace("/3 ", "/900 ") for line in LINES]
    stop = "stopping_early: wallclock_cap train_time: 300ms step: 3/900"
    assert not read_log(write(tmp_path, lines)).complete
    log = read_log(write(tmp_path, [*lines, stop]))
    assert (log.complete, log.steps_total, log.points) == (True, 3, tuple(POINTS))


LLMC = ["s:0 tel:10.9000", "s:0 trl:10.8 lr:0.000001 norm:9.00", "s:1 trl:9.8 lr:0.000001 norm:9.00", "s:2 eval:0.25"]
NANOGPT = [
    "tokens per iteration will be: 1,000",
    "step 0: train loss 10.8, val loss 10.9000",
    "iter 0: loss 10.8, time 9ms",
]
DIALECTS = {
    "llm.c": ([*LLMC, "s:2 tel:3.2700"], "llm.c"),
    "nanoGPT": ([*NANOGPT, "iter 1: loss 4.1, time 9ms", "step 2: train loss 3.1, val loss 3.2700"], "PyTorch"),
    "slowrun": (["Step 00000 | Val BPB: 2.9 | Val Loss: 10.9000", "step 00001 (50.00%) | loss: 9.1 | dt: 4.00ms",
                 "Step 00002 | Epoch 1 | Val BPB: 1.0 | Val Loss: 3.2700"], "PyTorch"),
    "parameter-golf": (["0/2 val_loss: 10.9000 val_bpb: 4.1", "1/2 train_loss: 9.0 train_time: 0.1m tok/s: 9",
                        "1776142723.115 2/2 val_loss: 3.2700 val_bpb: 1.1"], "PyTorch"),
    "no length": (["step:0 val_loss:10.9000 train_time:0ms", "step:2 val_loss:3.2700 train_time:9ms"], "PyTorch"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("before", ["", "[rank0]: ", "99%|####   | 9/10 [00:01]"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_dialects(tmp_path, name, before, end):
    lines, program = DIALECTS[name]
    log = read_log(write(tmp_path, [before + line for line in lines], end=end), tokens_per_step=1000)
    assert [point[:3] for point in log.points] == [(0, 0, 10.9), (2, 2000, 3.27)]
    assert (log.complete, log.implementation) == (True, program)
    assert [note for note in log.notes if "counts as final" not in note and "as the log says" not in note] == []


def test_a_run_that_went_on_after_its_last_evaluation_is_not_complete(tmp_path):
    log = read_log(write(tmp_path, [*LLMC, "s:2 tel:3.2", "s:2 trl:3.1", "s:3 trl:3.1"]), tokens_per_step=1)
    assert (log.complete, log.final.step) == (False, 2)


@pytest.mark.parametrize(
    ("line", "batch"),
    [
        ("tokens per iteration will be: 491,520", 491_520),
        ("Total batch size 524,288 => gradient accumulation steps: 1", 524_288),
        ("train_batch_tokens:786432 train_seq_len:1024 iterations:20000", 786_432),
        ("1776.5   train_batch_tokens: 786432", 786_432),
    ],
)
def test_tokens_of_a_step_that_the_log_tells(tmp_path, line, batch):
    lines = [line, "step:0/2 val_loss:9 train_time:0ms", "step:2/2 val_loss:4 train_time:9ms"]
    log = read_log(write(tmp_path, lines), tokens_per_step=1)
    assert [point.tokens for point in log.points] == [0, 2 * batch]
    assert log.notes == (f"its tokens are counted in steps of {batch:,}, as the log says",)
    with pytest.raises(UserError, match=r"line 3: no tokens: field and a batch that grows; give --tokens-per-step"):
        read_log(write(tmp_path, [line, "step:1 batch_switch:100->200", *lines[1:]]))


def test_bits_a_byte_are_no_loss_and_the_error_says_what_is_read(tmp_path):
    with pytest.raises(UserError, match=r"only bits a byte.*`s:N tel:X`.*val loss X`.*Val Loss: X`"):
        read_log(
            write(tmp_path, ["Step 00000 | Validation bpb: 3.16", "step 00001/00500 (0.2%) | loss: 10.3 | dt: 1ms"])
        )
    with pytest.raises(UserError, match=r"no validation loss in it; .*lines like `step:N/M val_loss:X`.*llm\.c"):
        read_log(write(tmp_path, ["epoch 1, loss 3"]))


def test_a_resumed_run_goes_back_and_what_it_repeats_is_the_same(tmp_path):
    lines = [
        *LLMC,
        "s:2 tel:5.0",
        "s:2 trl:4.9",
        "s:3 trl:4.8",
        "s:4 tel:4.5",
        "s:2 trl:4.8",
        "s:3 trl:4.7",
        "s:4 tel:4.5",
    ]
    log = read_log(write(tmp_path, lines), tokens_per_step=1)
    assert [(point.step, point.val_loss) for point in log.points] == [(0, 10.9), (2, 5.0), (4, 4.5)]
    assert log.notes[0] == "line 9 goes on from an earlier step; what came after it is left out"


def seeds(count: int, head: list[str] = ()) -> list[list[str]]:
    """LINES with 0.0001 more loss for each seed."""
    return [[*head, *(line.replace("000 train", f"{seed:03} train") for line in LINES)] for seed in range(count)]


def test_several_runs_in_one_file(tmp_path):
    runs = seeds(20, ["import torch", "step:{step}/{total} val_loss:{val_loss:.4f}"])
    logs = read_logs(write(tmp_path, [line for run in runs for line in run]))
    assert [len(log.points) for log in logs] == [4] * 20
    assert [log.points[2].val_loss for log in logs] == pytest.approx([3.2 + seed / 10_000 for seed in range(20)])
    assert len({log.group_key for log in logs}) == 1
    with pytest.raises(UserError, match="20 runs in one file"):
        read_log(tmp_path / "run.txt")


def test_runs_that_were_cut_short_are_runs(tmp_path):
    first, second, third = seeds(3)
    logs = read_logs(write(tmp_path, [*first[:3], *second, *third[:1]]))
    assert [(len(log.points), log.complete) for log in logs] == [(3, False), (4, True), (1, False)]
    logs = read_logs(write(tmp_path, [*first[:3], *second, "step:0/3 train_time:0ms"]))
    assert [(len(log.points), log.complete) for log in logs] == [(3, False), (4, True)]
    assert logs[0].notes == ("the run that begins in line 8 has not evaluated and was passed over",)


def test_runs_of_other_lengths_are_other_groups(tmp_path):
    first, second = seeds(2)
    logs = read_logs(write(tmp_path, [*first, *(line.replace("/3 ", "/9 ") for line in second)]))
    assert [log.steps_total for log in logs] == [3, 9]
    assert logs[0].group_key != logs[1].group_key


def test_an_evaluation_that_is_printed_again_counts_once(tmp_path):
    log = read_log(write(tmp_path, [*LINES, "=== summary", LINES[2], LINES[3]]))
    assert (log.points, log.notes) == (
        tuple(POINTS),
        ("line 6 repeats an evaluation and was passed over (2 such lines)",),
    )
    ranks = [f"[rank{rank}]: {line}" for line in ["step:0/3 train_time:1ms", *LINES] for rank in range(2)]
    assert read_log(write(tmp_path, ranks)).points == tuple(POINTS)


def test_two_equal_runs_are_two_and_said_to_be_equal(tmp_path):
    logs = read_logs(write(tmp_path, [*LINES, *LINES]))
    assert [log.points for log in logs] == [tuple(POINTS)] * 2
    assert logs[0].notes == ("the run that begins in line 5 equals another one: is it one run twice?",)


@pytest.mark.parametrize("loss", ["nan", "NaN", "-nan", "inf", "-inf"])
def test_a_diverged_run_has_the_points_before(tmp_path, loss):
    lines = [*LINES[:2], *(line.replace(f"{5 - k}.{k}000", loss) for k, line in enumerate(LINES) if k > 1)]
    log = read_log(write(tmp_path, lines))
    assert (log.diverged, log.complete, log.points) == ("step 2", False, tuple(POINTS[:2]))
    log = read_log(write(tmp_path, lines[3:]))
    assert (log.diverged, log.final) == ("step 3", None)
    llmc = [*LLMC, f"s:2 tel:{loss}"]
    assert read_log(write(tmp_path, llmc), tokens_per_step=1).diverged == "step 2"


def test_training_losses_that_are_no_numbers(tmp_path):
    trained = [f"step:{k}/3 train_loss:{'nan' if k > 1 else 5} train_time:{k}00ms" for k in range(1, 4)]
    log = read_log(write(tmp_path, [*LINES[:2], *trained]))
    assert (log.diverged, log.final.step) == ("step 2", 1)
    recovered = read_log(write(tmp_path, [LINES[0], trained[1], LINES[3]]))
    assert (recovered.diverged, recovered.complete) == (None, True)


def test_a_diverged_run_of_ours_and_in_a_csv(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"preset": "tiny", "steps": 3}))
    records = [{"step": k, "tokens_trained": k, "val_loss": 5.0 if k < 2 else float("nan")} for k in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    log = read_log(tmp_path)
    assert (log.diverged, log.complete, len(log.points)) == ("step 2", False, 2)
    log = read_log(write(tmp_path, ["tokens,val_loss", "1000,5.0", "2000,nan"], "points.csv"))
    assert (log.diverged, log.complete, len(log.points)) == ("2,000 tokens", False, 1)


def test_several_curves_in_a_csv(tmp_path):
    logs = read_logs(write(tmp_path, ["tokens,val_loss", "1000,5", "2000,4", "tokens,val_loss", "1000,6"], "a.csv"))
    assert [[point.val_loss for point in log.points] for log in logs] == [[5, 4], [6]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("step:2/3 val_lo", "not a complete step line"),
        ("step:2/3 val_loss:", "not a complete step line"),
        ("step:2/3 val_loss:3.2000", "not a complete step line"),
        ("step:2/3 val_loss:three train_time:200ms tokens:2.00M", "val_loss is 'three', not a finite number"),
        ("[rank0]: step:2/3 val_loss:3.2 train_time:2 tokens:2.00M", "not a complete step line"),
        ("s:2 tel:1.2.3", "val_loss is '1.2.3', not a finite number"),
        ("step 2: train loss 3.1, val loss x", "val_loss is 'x', not a finite number"),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_refused_in_any_dialect(tmp_path, line, reason):
    with pytest.raises(UserError, match=f"line 3: {reason}"):
        read_log(write(tmp_path, [*LINES[:2], line, LINES[3]]))
