"""Tables that fit a terminal: narrow columns, names that stay apart, remarks said once."""

import pytest
from written_logs import run_folder, torch_log

from senano_jax.compare import Arguments, figures, main
from senano_jax.runlog.comparison import read_groups
from senano_jax.runlog.short_names import LEAST_WIDTH, short_names
from senano_jax.runlog.tables import Table
from senano_jax.runlog.terminal import print_tables

LONG = [
    "torch-recurrent-h100-200-steps-seed5",
    "torch-recurrent-h100-200-steps-seed6",
    "torch-no-value-embeddings-h100-200-steps-seed6",
    "recurrent (data.val_tokens=2621440, init_from=None)",
    "recurrent (data.val_tokens=5242880, init_from=None)",
    "recurrent",
]


@pytest.mark.parametrize("width", [LEAST_WIDTH, 20, 30, 50])
def test_short_names_fit_and_differ(width):
    short = short_names(LONG, width)
    assert max(map(len, short)) <= width
    assert len(set(short)) == len(LONG)
    assert short[-1] == "recurrent"


def test_names_that_fit_stay_as_they_are():
    assert short_names(LONG, 51) == LONG


def test_names_are_cut_in_the_middle_and_keep_what_tells_them_apart():
    assert short_names(LONG, 20)[:2] == ["torch-rec…teps-seed5", "torch-rec…teps-seed6"]
    four_million = short_names(LONG, 20)[3:5]
    assert ["26" in name or "21" in name for name in four_million] != ["52" in name for name in four_million]


def test_names_that_differ_too_little_to_see_are_numbered():
    names = ["a" * 40 + sign + "b" * 40 + end + "c" * 40 for sign in "xy" for end in "xy"]
    short = short_names(names, LEAST_WIDTH)
    assert len(set(short)) == 4
    assert max(map(len, short)) <= LEAST_WIDTH


def many_runs(folder):
    logs = [torch_log(folder / f"torch-a-system-with-a-long-name-200-steps-seed{k}.txt", 6.0, 4.0) for k in range(5)]
    ours = [
        run_folder(folder / f"{dim}{s}", 5.0, 3.9 - s / 70, seed=s, model={"dim": dim})
        for dim in (64, 65)
        for s in (0, 1)
    ]
    return [*logs, *ours]


def test_tables_and_remarks_are_narrower_than_100_columns(tmp_path, capsys):
    main(
        Arguments(
            (f"a name of some length={torch_log(tmp_path / 'a.txt', 6.0, 4.1)}", *many_runs(tmp_path)), target=4.0
        )
    )
    printed = capsys.readouterr().out
    tables, full_names = printed.split("Names in full")
    assert max(map(len, tables.split("\n"))) < 100
    assert "torch-a-system-with-a-long-name-200-steps-seed3" not in tables
    assert "torch-a-system-with-a-long-name-200-steps-seed3" in full_names
    assert "3.8929 ± 0.0101" in tables


def test_cells_are_broken_before_names_get_short(capsys):
    cells = ("3.5952 ± 0.0103 (n=2)", "+265.12M (+40.8%)", "123,456,789,012,345", "650.18M ± 1.76M", "no comparison")
    print_tables([Table("t", ("run", "a", "b", "c", "d", "e"), (("n" * 28, *cells),))], [])
    printed = capsys.readouterr().out
    assert "n" * 28 in printed
    assert "123,456,789,012,345" in printed
    assert max(map(len, printed.split("\n"))) < 100


def test_what_holds_for_many_runs_is_said_once(tmp_path):
    first = torch_log(tmp_path / "first.txt", 6.0, 5.0, 4.0)
    others = [torch_log(tmp_path / f"{name}.txt", 5.0, total=2) for name in "xyz"]
    _, remarks = figures(read_groups([first, *others], None), 3.28)
    assert remarks == [
        "first and the others: a schedule of 2.00M tokens, not 3.00M",
        "the others: not complete (evaluated at step 1 of 2); its loss is not a final one",
    ]
    more = torch_log(tmp_path / "more.txt", 5.0, 4.0, 3.9)
    _, remarks = figures(read_groups([first, *others, more], None), 3.28)
    assert remarks[0] == "first and x, y and z: a schedule of 2.00M tokens, not 3.00M"
