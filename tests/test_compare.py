"""The command: groups, their figures and tests, and what it prints and writes."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from written_logs import run_folder, torch_log

from senano_jax.compare import Arguments, main
from senano_jax.errors import UserError
from senano_jax.files import write_atomically
from senano_jax.runlog.comparison import compare, notes, read_groups
from senano_jax.runlog.tables import comparison_tables, format_time, format_tokens, to_markdown


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of ours, and as many PyTorch logs of which each needs twice the tokens for a loss of 4."""
    ours = [
        run_folder(tmp_path / f"run{seed}", 5.0, 4.0 - seed / 100, 3.0 - seed / 100, seed=seed) for seed in range(3)
    ]
    theirs = [torch_log(tmp_path / f"{seed}.txt", 6.0, 5.0, 4.5, 4.0 - seed / 100) for seed in range(3)]
    return ours, theirs


def test_seeds_of_one_configuration_are_one_group(seeds, tmp_path):
    ours, theirs = seeds
    other = run_folder(tmp_path / "wider", 5.0, 3.9, 2.9, model={"dim": 65})
    groups = read_groups([theirs[0], *ours, other], None)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("0", 1),
        ("tiny (model.dim=64)", 3),
        ("tiny (model.dim=65)", 1),
    ]


def test_the_user_groups_and_names(seeds):
    ours, theirs = seeds
    groups = read_groups([f"torch={','.join(theirs)}", f"a={ours[0]}", *ours[1:]], None)
    assert [(group.name, len(group.runs)) for group in groups] == [("torch", 3), ("a", 1), ("tiny", 2)]


def test_a_path_with_signs_in_it_is_a_path(tmp_path):
    odd = torch_log(tmp_path / "lr=0.1,b.txt", 5.0)
    assert read_groups([odd], None)[0].name == "lr=0.1,b"
    assert [run.name for run in read_groups([f"x={odd}"], None)[0].runs] == ["lr=0.1,b"]


def test_equal_names_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    logs = [torch_log(tmp_path / place / "run.txt", 5.0) for place in "ab"]
    third = torch_log(tmp_path / "third.txt", 5.0)
    assert [group.name for group in read_groups([*logs, f"run={third}"], None)] == ["run #2", "run #3", "run"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{log}", "{log}"], "given twice"),
        (["a={log},{log}"], "given twice"),
        (["a={log}", "a=published:recurrent"], "the name 'a' is used twice"),
        (["\x1b={log}"], "not printable"),
        (["a=missing.txt"], "missing.txt: no such file"),
    ],
)
def test_groups_that_cannot_be(tmp_path, arguments, reason):
    log = torch_log(tmp_path / "run.txt", 5.0)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_groups([argument.format(log=log) for argument in arguments], None)


def test_figures_of_groups(seeds):
    ours, theirs = seeds
    torch, jax = compare(read_groups([f"torch={','.join(theirs)}", *ours], None), target=4.0)
    assert (torch.n, torch.reached, torch.implementation, torch.parameters) == (3, 3, "PyTorch", None)
    assert (jax.n, jax.reached, jax.implementation, jax.parameters) == (3, 3, "senano_jax", 1000)
    assert (torch.final_loss.mean, torch.final_loss.sd) == pytest.approx((3.99, 0.01))
    assert torch.tokens_per_s == pytest.approx(1e7)
    # seed s goes from 5 at 1M to 4 - s/100 at 2M tokens, linearly in the logarithm
    by_hand = sum(1e6 * 2 ** (1 / (1 + s / 100)) for s in range(3)) / 3
    assert jax.tokens_to_target.mean == pytest.approx(by_hand)
    assert jax.tokens_saved == pytest.approx(torch.tokens_to_target.mean - by_hand)
    assert jax.saved_fraction == pytest.approx(1 - by_hand / torch.tokens_to_target.mean)
    assert jax.final_loss_test.difference == pytest.approx(-1.0)
    assert jax.final_loss_test.p < 1e-6
    assert torch.p_below_target == pytest.approx(0.1127, abs=1e-4)  # t = -sqrt(3), 2 degrees of freedom
    assert (jax.common_tokens, jax.difference_at_common) == (3e6, pytest.approx(2.99 - 4.5))
    assert (torch.tokens_saved, torch.final_loss_test, torch.difference_at_common) == (None, None, None)


def test_a_run_evaluated_only_before_training_has_no_speed(tmp_path):
    log = tmp_path / "untrained.txt"
    log.write_text("step:0/9 val_loss:10.8 train_time:3ms step_avg:nanms tokens:0.00M\n")
    (row,) = compare(read_groups([str(log)], None), target=3.28)
    assert row.tokens_per_s is None


def test_a_name_without_logs_is_refused():
    with pytest.raises(UserError, match="'A=,,' names no log; write NAME=LOG,LOG"):
        read_groups(["A=,,"], None)


def test_runs_that_are_not_complete_are_left_out_and_said_so(tmp_path):
    logs = [torch_log(tmp_path / "a.txt", 5.0, 4.0), torch_log(tmp_path / "b.txt", 5.0, total=2)]
    groups = read_groups([f"x={','.join(logs)}"], None)
    (row,) = compare(groups, target=3.28)
    assert (row.n, row.final_loss.mean, row.reached, row.tokens_to_target) == (1, 4.0, 0, None)
    assert notes(groups) == ["x: 1 of 2 runs left out as not complete"]
    groups = read_groups([logs[1]], None)
    (row,) = compare(groups, target=3.28)
    assert (row.complete, row.p_below_target) == (False, None)
    assert "not complete (evaluated at step 1 of 2)" in notes(groups)[0]


def test_remarks_on_seeds_and_on_evaluations(tmp_path):
    same = [run_folder(tmp_path / name, 5.0, 4.0) for name in "ab"]
    rare = tmp_path / "rare.txt"
    rare.write_text("step:2/2 val_loss:4.1 train_time:9ms step_avg:4.50ms tokens:2.00M\n")
    remarks = notes(read_groups([*same, str(rare)], None))
    assert "two runs have one seed" in remarks[0]
    assert "rare: evaluated at other token counts" in remarks[1]


def test_runs_from_given_weights_are_no_seed_twice(tmp_path):
    starts = ("a.pt", "b.pt", None)
    runs = [run_folder(tmp_path / str(start), 5.0, 4.0, init_from=start) for start in starts]
    assert notes(read_groups([f"x={','.join(runs)}"], None)) == []


def test_the_first_row_may_not_have_reached(seeds, tmp_path):
    ours, _ = seeds
    never = torch_log(tmp_path / "never.txt", 6.0, 5.5)
    rows = compare(read_groups([never, *ours], None), target=4.0)
    assert rows[1].tokens_saved is None
    result = comparison_tables(rows, 4.0)[0]
    assert result.rows[0][4] == "not reached"
    assert result.rows[1][5] == "-"


def test_the_published_record_in_a_table():
    tables = comparison_tables(compare(read_groups(["published:recurrent"], None), 3.28), 3.28)
    assert [table.title for table in tables] == ["Results", "Cost"]
    assert tables[0].rows == (("published recurrent", "162,165,555", "668.47M", "3.2701", "650.18M", "first"),)
    assert tables[1].rows[0][2:] == ("2 x RTX 4090", "1,700", "752.03M", "1:49:16", "101,970")


def test_the_published_curves_draw_the_history(tmp_path):
    logs = ("published:value-embeddings", "published:recurrent")
    first, second = compare(read_groups(logs, None), 3.28)
    assert (first.tokens_trained, first.parameters, first.comparable) == (695_992_320, 275_598_388, True)
    assert (first.final_loss.mean, second.final_loss.mean) == (3.2782, 3.2701)
    assert second.saved_fraction == pytest.approx(0.0594, abs=1e-4)
    with pytest.raises(UserError, match="no-value-embeddings has no curve here, only the token count"):
        read_groups(["published:no-value-embeddings"], None)
    main(Arguments(logs, out=tmp_path / "a.html", records=True))
    data = json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / "a.html").read_text())[1])
    marks = [[668.4672, "668.47M recurrent"], [695.99232, "695.99M value-embeddings"]]
    assert data["charts"][0]["marks"] == [*marks, [747.1104, "747.11M no-value-embeddings"]]
    assert data["charts"][0]["xMax"] > 747.1104
    assert [chart["marks"] for chart in data["charts"][1:]] == [[], []]


def test_the_page_has_the_values_of_the_tables(seeds, tmp_path):
    """Under the pointer are the figures of the tables, means over seeds included."""
    ours, theirs = seeds
    groups = read_groups([f"torch={','.join(theirs)}", *ours], None)
    results, tests, _ = comparison_tables(compare(groups, 4.0), 4.0)
    main(Arguments((f"torch={','.join(theirs)}", *ours), target=4.0, out=tmp_path / "a.html"))
    data = json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / "a.html").read_text())[1])
    by_tokens, by_time, differences = data["charts"]
    for row, line, style in zip(results.rows, by_tokens["series"], data["styles"]):
        assert row[3].startswith(f"{line['points'][-1][1]:.4f} ± ")
        assert style["label"] == f"{row[0]}: {row[4].split(' ± ')[0]}"
    at, difference = differences["series"][1]["points"][-1]
    assert tests.rows[1][4] == f"{difference:+.4f} at {format_tokens(at * 1e6)}"
    assert [by_time["series"][k]["points"][-1][0] * by_time["clock"] for k in (0, 1)] == pytest.approx([400, 150])
    assert [chart["yLabel"] for chart in data["charts"]] == [
        "validation loss, nats per token", "validation loss, nats per token", "difference, nats per token",
    ]  # fmt: skip


def test_formats():
    assert format_tokens(650_179_142) == "650.18M"
    assert format_tokens(10_485_760_000) == "10,485.76M"
    assert format_tokens(-699_000, like=6e8) == "-0.70M"
    assert format_tokens(8192) == "8,192"
    assert format_time(6_555_576) == "1:49:16"
    assert format_time(59_999) == "0:01:00"


def test_markdown_keeps_its_columns(seeds):
    ours, theirs = seeds
    rows = compare(read_groups([f"a|b={theirs[0]}", *ours], None), 4.0)
    for table in comparison_tables(rows, 4.0):
        lines = to_markdown(table).split("\n")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) == 4


def test_prints_and_writes_json(seeds, tmp_path, capsys):
    ours, _ = seeds
    target = tmp_path / "figures.json"
    main(Arguments(("published:recurrent", *ours), json=target))
    printed = capsys.readouterr().out
    assert "162,165,555" in printed
    assert "650.18M" in printed
    document = json.loads(target.read_text(), parse_constant=pytest.fail)
    assert document["target"] == 3.28
    assert document["rows"][0]["tokens_to_target"]["mean"] == pytest.approx(650.18e6, rel=1e-5)
    assert document["rows"][1]["runs"][2]["points"][0] == [1_000_000, 5.0, 50.0]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml")])
def test_pictures_are_made_the_same_each_time(seeds, tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    ours, theirs = seeds
    contents = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.{suffix}"
        main(Arguments((f"_a$b$={','.join(theirs)}", *ours), target=4.0, out=out))
        contents.append(out.read_bytes())
    assert contents[0].startswith(start)
    assert contents[0] == contents[1]
    if suffix == "svg":
        assert ElementTree.fromstring(contents[0]).tag.endswith("svg")


def test_pictures_of_little(tmp_path):
    """One run, a run without times, one evaluated only before training, one far from the target."""
    pytest.importorskip("matplotlib")
    csv = tmp_path / "points.csv"
    csv.write_text("tokens,val_loss\n1000,5\n2000,4\n")
    untrained = tmp_path / "untrained.txt"
    untrained.write_text("step:0/9 val_loss:10.8 train_time:0ms step_avg:nanms tokens:0.00M\n")
    for index, logs in enumerate(
        [[str(csv)], [str(untrained)], [str(csv), str(untrained)], [str(untrained), str(csv)]]
    ):
        for suffix in ("png", "html"):
            out = tmp_path / f"{index}.{suffix}"
            main(Arguments(tuple(logs), target=0.5, out=out))
            assert out.stat().st_size > 5000


def test_the_page_needs_nothing_else_and_shows_any_name(seeds, tmp_path):
    ours, theirs = seeds
    out = tmp_path / "page.html"
    main(Arguments((f"<b>&amp;={theirs[0]}", f"<!--<script>={theirs[1]}", *ours), out=out))
    page = out.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(", page)
    assert "default-src 'none'" in page
    assert page.count("<script") == 2
    assert "<!--<" not in page
    assert "&lt;!--&lt;script&gt;" in page
    data = json.loads(re.search(r'id="data">(.*)</script>', page)[1])
    assert [style["name"] for style in data["styles"]] == ["<b>&amp;", "<!--<script>", "tiny"]
    assert [chart["title"] for chart in data["charts"]][:2] == [
        "validation loss, by tokens",
        "validation loss, by time",
    ]
    assert data["charts"][0]["series"][2]["points"][0] == [1.0, 5.0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logs": ()}, "no LOG given"),
        ({"target": float("nan")}, "--target is nan"),
        ({"target": -1.0}, "--target is -1"),
        ({"tokens_per_step": 0}, "--tokens-per-step is 0"),
        ({"out": Path("curve.gif")}, "cannot write .gif; use .png, .svg, .html"),
        ({"out": Path("no/such/curve.png")}, "there is no folder no/such"),
        ({"json": Path()}, "is a folder"),
    ],
)
def test_arguments_that_cannot_work(changes, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        main(Arguments(**{"logs": ("published:recurrent",)} | changes))


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install 'senano-jax[plot]'")):
        main(Arguments(("published:recurrent",), out=tmp_path / "a.png"))
    main(Arguments(("published:recurrent",), out=tmp_path / "a.html"))  # the page draws itself


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomically(target, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_command_ends_in_one_line(tmp_path):
    command_line = [sys.executable, "-m", "senano_jax.compare"]
    bad = subprocess.run([*command_line, "missing"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: missing: no such file")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run([*command_line, "published:recurrent", "--markdown"], capture_output=True, text=True)
    assert good.returncode == 0
    assert "| published recurrent | 162,165,555 | 668.47M | 3.2701 | 650.18M | first |" in good.stdout
