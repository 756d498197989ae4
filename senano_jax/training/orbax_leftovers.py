"""Silence for what orbax leaves behind when one of a checkpoint's arrays cannot be read.

The others are being read at that moment. Orbax ends their event loop and raises the first error; each of the rest then
reports one of its own to sys.unraisablehook, when it is collected or when tensorstore comes back to the loop: hundreds
of lines about a checkpoint that has been passed over in one.
"""

import functools
import inspect
import sys
from pathlib import Path
from typing import Any


@functools.cache
def ignore_leftovers() -> None:
    """Makes sys.unraisablehook pass over them from now on, and all else on to the hook that there was."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _is_leftover(unraisable):
            report(unraisable)

    sys.unraisablehook = hook


def _is_leftover(unraisable: Any) -> bool:
    if inspect.iscoroutine(unraisable.object):
        return "orbax" in Path(unraisable.object.cr_code.co_filename).parts
    error = unraisable.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
