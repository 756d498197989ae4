"""--watch: logs that grow are read again, what has changed is shown and written, and Ctrl-C is the end."""

import re
from pathlib import Path

import pytest
from written_logs import torch_log

from senano_jax import compare
from senano_jax.compare import Arguments, main, with_seconds
from senano_jax.errors import UserError


def looks(monkeypatch, *between):
    """Does these between the looks, then interrupts; returns the seconds slept."""
    slept, left = [], list(between)

    def sleep(seconds):
        slept.append(seconds)
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(compare.time, "sleep", sleep)
    return slept


def test_a_run_is_watched_while_it_goes_on(tmp_path, monkeypatch, capsys):
    log, page = tmp_path / "run.txt", tmp_path / "page.html"
    seen = []

    def goes_on():
        seen.append(page.read_text())
        torch_log(log, 6.0, 5.0)

    slept = looks(monkeypatch, lambda: torch_log(log, 6.0, total=2), goes_on, lambda: None)
    main(Arguments((str(log),), watch=7, out=page))
    printed = capsys.readouterr().out
    assert slept == [7, 7, 7, 7]
    assert re.findall(r"^waiting: .*no such file", printed, re.MULTILINE)
    assert re.findall(r"^run .* ([0-9.]+ ?\(so far\)|5\.0000) ", printed, re.MULTILINE) == ["6.0000 (so far)", "5.0000"]
    assert printed.count("Ctrl-C ends") == 3  # nothing is shown again that has not changed
    assert 'http-equiv="refresh" content="7"' in seen[0]
    assert 'http-equiv="refresh"' not in page.read_text()
    assert "5.0000" in page.read_text()


def test_a_page_without_watch_does_not_load_itself(tmp_path):
    main(Arguments(("published:recurrent",), out=tmp_path / "a.html"))
    assert 'http-equiv="refresh"' not in Path(tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        ("--watch", "--watch 10"),
        ("--watch log", "--watch 10 log"),
        ("log --watch --out a.png", "log --watch 10 --out a.png"),
        ("--watch 2.5 log", "--watch 2.5 log"),
        ("--watch=3 log", "--watch=3 log"),
    ],
)
def test_seconds_may_be_left_out(words, filled):
    assert with_seconds(words.split()) == filled.split()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_seconds_that_cannot_be(seconds):
    with pytest.raises(UserError, match=r"--watch is .*; give the seconds"):
        main(Arguments(("published:recurrent",), watch=seconds))
