"""One kind of error for whatever the user can mend, printed as one line and without a traceback."""

import contextlib
import errno
import sys
from collections.abc import Iterator

from senano_jax.output import lasting_output, output_failure


class UserError(Exception):
    """What is wrong (the file, field or flag and its value) and what to do about it, in one line."""


@contextlib.contextmanager
def one_line_errors(*, prints_result: bool = True) -> Iterator[None]:
    """Ends the program when a `UserError` reaches it, with `error: ...` on standard error and status 2, or when the
    user interrupts it, with status 130.

    A standard output that fails ends nothing. Where it is the result that is printed, that is an error in the end,
    unless it had a reader that did not want more.
    """
    with lasting_output(notice=not prints_result):
        try:
            yield
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except SystemExit:
            _require_output(prints_result)
            raise
        _require_output(prints_result)


def _require_output(prints_result: bool) -> None:
    failure = output_failure()
    if prints_result and failure is not None and failure.errno != errno.EPIPE:
        print(f"error: standard output cannot be written ({failure.strerror}); make room and repeat", file=sys.stderr)
        sys.exit(2)


def check_counts(values: dict[str, int], least: int) -> None:
    """Raises UserError for the first flag whose value is below `least`, 0 or 1, or needs more than 31 bits."""
    for flag, value in values.items():
        if not least <= value < 2**31:
            bound = "be at least 1" if least else "not be negative"
            raise UserError(f"{flag} is {value}; it must {bound} and fit into 31 bits")
