"""One kind of error for whatever the user can mend, printed as one line and without a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """What is wrong (the file, field or flag and its value) and what to do about it, in one line."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program when a `UserError` reaches it, with `error: ...` on standard error and status 2, or when the
    user interrupts it, with status 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def check_counts(values: dict[str, int], least: int) -> None:
    """Raises UserError for the first flag whose value is below `least`, 0 or 1, or needs more than 31 bits."""
    for flag, value in values.items():
        if not least <= value < 2**31:
            bound = "be at least 1" if least else "not be negative"
            raise UserError(f"{flag} is {value}; it must {bound} and fit into 31 bits")
