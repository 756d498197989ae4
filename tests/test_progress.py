"""The live line of a terminal, and plain lines where there can be none."""

import pytest

from senano_jax.config import changed
from senano_jax.plan import Plan
from senano_jax.presets import demo
from senano_jax.runlog.progress import Progress

PLAN = Plan(changed(demo(), {"steps": 4}))


@pytest.fixture
def terminal(monkeypatch, capsys):
    """What has been shown since the last look, on a terminal of a kind."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # takes any output for a terminal

    def use(kind):
        monkeypatch.setenv("TERM", kind)
        return lambda: capsys.readouterr().out

    return use


def test_what_is_done_between_steps_is_said_at_once(terminal):
    """Also behind the last step, in place of a time that is left."""
    shown = terminal("xterm-256color")
    with Progress(PLAN) as progress:
        assert "compiling" in shown()
        progress.step(2, 5.0, 100.0, "a plain line")
        progress.doing("evaluating")
        assert "evaluating" in shown()
        progress.step(4, 4.0, 100.0, "a plain line")
        progress.doing("saving")
        last = shown().rpartition("loss 4.0000")[2]
        assert "saving" in last and "left" not in last


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(terminal):
    shown = terminal("dumb")
    with Progress(PLAN) as progress:
        progress.step(1, 5.0, 100.0, "step:1/4 loss:5.0000")
        progress.doing("evaluating")
    assert shown() == "step:1/4 loss:5.0000\n"
