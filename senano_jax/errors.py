"""One kind of error for whatever the user can mend, printed as one line and without a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """What is wrong (the file, field or flag and its value) and what to do about it, in one line."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with status 2 and `error: ...` on standard error when a `UserError` reaches it."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
