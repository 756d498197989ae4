"""Which runs are held against which: not those that diverged, nor those on other text or in mid-schedule."""

import json
import math
from pathlib import Path

import pytest
from written_logs import run_folder, torch_log

from senano_jax.compare import Arguments, figures, main
from senano_jax.runlog.comparison import compare, read_groups
from senano_jax.runlog.curves import mean_curve
from senano_jax.runlog.series import series_of
from senano_jax.runlog.tables import comparison_tables


def on_text(path: Path, sha256: str | None, name: str = "val.bin") -> None:
    """Makes the run in `path` one that was validated on such a shard."""
    shard = {"name": name, "bytes": 3024, "tokens": 1000, "sha256": sha256}
    (path / "data.json").write_text(json.dumps({"train": [], "val": [shard]}))


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (("a" * 64,), ("b" * 64,), "val.bin (bbbbbbbb), not on val.bin (aaaaaaaa)"),
        ((None,), (None, "other.bin"), "other.bin, not on val.bin"),
        (("a" * 64,), ("a" * 64, "renamed.bin"), None),
        ((None,), ("b" * 64,), None),
    ],
)
def test_losses_on_other_text_are_not_compared(tmp_path, first, second, difference):
    runs = [tmp_path / name for name in "ab"]
    for run, text in zip(runs, (first, second)):
        run_folder(run, 5.0, 4.0, 3.0)
        on_text(run, *text)
    groups = read_groups([f"x={runs[0]}", f"y={runs[1]}"], None)
    rows, remarks = figures(groups, 4.5)
    assert bool(series_of(groups, 4.5)[1].difference) == (difference is None)  # nor are they drawn
    saved, against = comparison_tables(rows, 4.5)[0].rows[1][5], comparison_tables(rows, 4.5)[1].rows[1][2:]
    if difference is None:
        assert (rows[1].tokens_saved, rows[1].difference_at_common, remarks) == (0, 0, [])
    else:
        assert (saved, against) == ("no comparison", ("-", "-", "-"))
        assert remarks[0] == f"x and y: NO COMPARISON: validated on {difference}"


def test_more_validation_tokens_are_other_text(tmp_path):
    runs = [run_folder(tmp_path / str(n), 5.0, 4.0, data={"val_tokens": n}) for n in (1000, 2000)]
    rows, remarks = figures(read_groups([f"x={runs[0]}", f"y={runs[1]}"], None), 4.5)
    assert rows[1].tokens_saved is None
    assert "x and y: NO COMPARISON: validated on 2,000 tokens, not 1,000" in remarks
    _, remarks = figures(read_groups([f"x={','.join(runs)}"], None), 4.5)
    assert "x: NO COMPARISON: validated on 2,000 tokens, not 1,000" in remarks


def test_a_record_is_not_held_against_a_short_run_on_other_text(tmp_path):
    short = tmp_path / "short"
    run_folder(short, 3.9, 3.5, batch_tokens=10**6)
    on_text(short, "a" * 64)
    rows, remarks = figures(read_groups(["published:recurrent", str(short)], None), 3.6)
    assert (rows[1].tokens_to_target is not None, rows[1].tokens_saved, rows[1].final_loss_test) == (True, None, None)
    assert remarks[0] == (
        "published recurrent and tiny: NO COMPARISON: validated on val.bin (aaaaaaaa), not on fineweb_val_000000.bin; "
        "a schedule of 2.00M tokens, not 668.47M, and 3.6 came after 44% of one of them"
    )


def test_the_middle_of_a_long_schedule_is_not_held_against_the_end_of_a_short_one(tmp_path):
    """But a long run that came down at its end is: that is what a record saves."""
    long = torch_log(tmp_path / "long.txt", 6.0, 5.0, 4.5, 4.0, 3.9, 3.0)
    short = torch_log(tmp_path / "short.txt", 5.0, 3.0)
    rows, remarks = figures(read_groups([long, short], None), 4.6)
    assert (rows[1].tokens_saved, rows[1].comparable) == (None, False)
    assert remarks[0].startswith(
        "long and short: NO COMPARISON: a schedule of 2.00M tokens, not 6.00M, and 4.6 came after"
    )
    rows, remarks = figures(read_groups([long, short], None), 3.0)
    assert rows[1].tokens_saved == pytest.approx(4e6)
    assert remarks[0] == "long and short: a schedule of 2.00M tokens, not 6.00M"


def test_a_diverged_run_does_not_keep_the_others_from_being_compared(tmp_path, capsys):
    good = [torch_log(tmp_path / f"{seed}.txt", 6.0, 5.0, 4.0 - seed / 100) for seed in range(2)]
    lost = torch_log(tmp_path / "lost.txt", 6.0, math.nan, math.nan)
    at_once = torch_log(tmp_path / "at_once.txt", math.nan)
    target = tmp_path / "figures.json"
    out = tmp_path / "page.html"
    main(Arguments((f"base={good[0]}", f"new={good[1]},{lost}", at_once), target=4.5, json=target, out=out))
    printed = capsys.readouterr().out
    assert "new: 1 of 2 runs DIVERGED: the loss is no number from step 2 on" in printed
    assert "at_once: the run DIVERGED: the loss is no number from step 1 on" in printed
    assert "not complete" not in printed
    _, new, diverged = json.loads(target.read_text(), parse_constant=pytest.fail)["rows"]
    assert (new["n"], new["final_loss"]["mean"]) == (1, 3.99)
    assert new["tokens_saved"] > 0
    assert [run["diverged"] for run in new["runs"]] == [None, "step 2"]
    assert (diverged["final_loss"], diverged["tokens_to_target"]) == (None, None)
    rows = compare(read_groups([lost, good[0]], None), target=4.5)
    assert [cells[3:] for cells in comparison_tables(rows, 4.5)[0].rows] == [
        ("4.0000", "2.45M", "first"), ("diverged", "-", "-"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_a_diverged_run_can_be_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    lost = [torch_log(tmp_path / "a.txt", math.nan), torch_log(tmp_path / "b.txt", 6.0, math.inf)]
    good = torch_log(tmp_path / "c.txt", 6.0, 5.0)
    for logs in ([lost[0]], lost, [*lost, good], [good, *lost], [f"x={','.join(lost)}"]):
        main(Arguments(tuple(logs), out=tmp_path / f"picture.{suffix}"))


def test_the_first_complete_run_of_a_group_need_not_be_its_first(tmp_path):
    cut, *whole = [torch_log(tmp_path / f"{seed}.txt", 6.0, 5.0 - seed / 10, total=2) for seed in range(3)]
    Path(cut).write_text(Path(cut).read_text().splitlines(keepends=True)[0])
    base = [torch_log(tmp_path / f"base{seed}.txt", 6.0, 5.5 - seed / 10) for seed in range(2)]
    rows = compare(read_groups([f"a={','.join(base)}", f"b={cut},{','.join(whole)}"], None), target=3.28)
    assert rows[1].final_loss_test.difference == pytest.approx(-0.6)


def test_the_runs_of_one_file_are_seeds(tmp_path):
    """Each name of a file's runs is the file's; they are one row with a spread."""
    texts = [Path(torch_log(tmp_path / f"{seed}.txt", 6.0, 5.0, 4.0 - seed / 100)).read_text() for seed in range(3)]
    (tmp_path / "all.txt").write_text("".join(texts))
    (row,) = compare(read_groups([str(tmp_path / "all.txt")], None), target=4.0)
    assert (row.name, row.n, row.reached) == ("all", 3, 3)
    assert (row.final_loss.mean, row.final_loss.sd) == pytest.approx((3.99, 0.01))


def test_counts_that_a_log_has_rounded_are_one_point_of_the_mean(tmp_path):
    """78.6432M tokens are 78.64M in a PyTorch log; there are means over both runs' evaluations, times included."""
    exact, rounded = tmp_path / "exact.csv", tmp_path / "rounded.csv"
    exact.write_text("tokens,val_loss,train_time_ms\n39321600,5,100\n78643200,4,200\n")
    rounded.write_text("tokens,val_loss,train_time_ms\n39320000,6,300\n78640000,5,400\n")
    (group,) = read_groups([f"x={exact},{rounded}"], None)
    curve = mean_curve(group.runs)
    assert [tuple(point) for point in curve] == [(None, 39321600, 5.5, 200), (None, 78643200, 4.5, 300)]


def test_evaluations_of_one_run_that_lie_close_stay_apart(tmp_path):
    dense = tmp_path / "dense.csv"
    dense.write_text("tokens,val_loss\n" + "".join(f"{10**6 + 100 * k},{5 - k / 10}\n" for k in range(4)))
    (group,) = read_groups([str(dense)], None)
    assert [point.val_loss for point in mean_curve(group.runs)] == [5, 4.9, 4.8, 4.7]
