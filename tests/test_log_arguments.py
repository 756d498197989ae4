"""What the arguments of `compare` name: paths, globs, the home folder, and the tokens of a step."""

import re
from pathlib import Path

import pytest
from written_logs import run_folder, steps_log, torch_log

from senano_jax.compare import Arguments, main
from senano_jax.errors import UserError
from senano_jax.runlog.comparison import read_groups


def test_each_log_with_its_own_batch(tmp_path):
    logs = [steps_log(tmp_path / f"{name}.txt", 6.0, 5.0, 4.0) for name in ("a", "b", "c@7")]
    arguments = [f"{logs[0]}@1000", f"grows={logs[1]}@100x1+1_000", logs[2]]
    groups = read_groups(arguments, 50)
    assert [[point.tokens for point in group.runs[0].points] for group in groups] == [
        [1000, 2000, 3000], [100, 1100, 2100], [50, 100, 150],
    ]  # fmt: skip
    assert [group.name for group in groups] == ["a", "grows", "c@7"]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("{log}@1000x2", "'1000x2' is no batch in tokens; write LOG@393216"),
        ("{log}@1000+2000", "is no batch in tokens"),
        ("{log}@0", "a step of 0 tokens"),
        ("{log}@user", "@user: no such file"),
        ("{counted}@1000", "line 1: the log counts its tokens itself; leave out the @"),
        ("{run}@1000", "counts its tokens itself; leave out the @"),
        ("published:recurrent@1000", "counts its tokens itself; leave out the @"),
        ("x={folder}/no-*.txt", "no-*.txt matches no file"),
        ("{log},{log}", "no such file"),
    ],
)
def test_batches_and_globs_that_cannot_be(tmp_path, argument, reason):
    log, counted = steps_log(tmp_path / "log.txt", 5.0), torch_log(tmp_path / "counted.txt", 5.0)
    run = run_folder(tmp_path / "run", 5.0)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_groups([argument.format(log=log, counted=counted, run=run, folder=tmp_path)], None)


def test_globs_and_the_home_folder(tmp_path, monkeypatch):
    """Where a shell expands neither: behind NAME=, and in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    logs = [torch_log(tmp_path / f"run[{k}].txt", 5.0 - k) for k in range(3)]
    torch_log(tmp_path / "run1.txt", 9.0)
    assert len(read_groups(["x=~/run*.txt"], None)[0].runs) == 4
    assert [group.runs[0].final.val_loss for group in read_groups(["~/run?.txt"], None)] == [9.0]
    assert [run.final.val_loss for run in read_groups([f"x=~/run[1].txt,{logs[2]}"], None)[0].runs] == [4.0, 3.0]
    with pytest.raises(UserError, match="given twice"):
        read_groups(["~/run[1].txt", logs[1]], None)
    main(Arguments(("~/run1.txt",), json=Path("~/figures.json")))
    assert (tmp_path / "figures.json").is_file()
