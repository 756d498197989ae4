"""What orbax leaves behind when a checkpoint cannot be read is not reported, and all else is."""

import sys
from types import SimpleNamespace

import pytest

from senano_jax.training.orbax_leftovers import ignore_leftovers


def coroutine_of(file):
    """Ended, of a function that `file` defines."""
    names = {}
    exec(compile("async def function(): pass", file, "exec"), names)
    coroutine = names["function"]()
    coroutine.close()
    return coroutine


@pytest.fixture
def reported(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    ignore_leftovers.__wrapped__()
    return seen


def test_what_is_left_of_reading_is_not_reported(reported):
    reading = coroutine_of("/lib/site-packages/orbax/checkpoint/serialization.py")
    sys.unraisablehook(SimpleNamespace(object=reading, exc_value=Exception("Encountered error")))
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    assert reported == []


def test_all_else_is(reported):
    other = coroutine_of("/home/me/orbax_of_mine.py")
    others = [
        SimpleNamespace(object=other, exc_value=Exception("Encountered error")),
        SimpleNamespace(object=None, exc_value=RuntimeError("something else")),
        SimpleNamespace(object=object(), exc_value=ValueError("Event loop is closed")),
    ]
    for unraisable in others:
        sys.unraisablehook(unraisable)
    assert reported == others
