"""Standard output and error of a program that goes on when they are lost: a reader that ended, a full disk, a closed
terminal. Characters that their encoding lacks are spelt out."""

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator

_SPELLINGS = {"±": "+-", "…": "..."}


class _Descriptor(io.FileIO):
    """A file descriptor that is /dev/null from the moment on that it cannot be written any more."""

    def __init__(self, number: int, when_lost: Callable[[OSError], None]):
        super().__init__(number, "w", closefd=False)
        self._when_lost = when_lost
        self.failure: OSError | None = None

    def write(self, data) -> int:
        unwritten = memoryview(data).cast("B")
        try:
            while unwritten:
                count = super().write(unwritten)
                if count is None:  # somebody has made it a pipe that does not wait
                    select.select([], [self], [])
                else:
                    unwritten = unwritten[count:]
        except OSError as error:
            self.failure = error
            _lead_nowhere(self.fileno())  # libraries and child processes write there too
            self._when_lost(error)
        return len(data)


@contextlib.contextmanager
def lasting_output(*, notice: bool) -> Iterator[None]:
    """Within it printing never raises. With `notice` standard error tells that standard output is lost.

    Streams that are not the process's own (those of a notebook, or of pytest) are left alone.
    """

    def tell(error: OSError) -> None:
        if notice:
            print(f"standard output is lost ({error.strerror}); going on without it", file=sys.stderr, flush=True)

    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    lasting = {"stdout": _lasting("stdout", 1, tell), "stderr": _lasting("stderr", 2, lambda error: None)}
    for name, stream in lasting.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in lasting.items():
            stream.flush()
            setattr(sys, name, before[name])


def output_failure() -> OSError | None:
    """What standard output was lost with; None while it works."""
    if sys.stdout is None:
        return None
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.failure if isinstance(raw, _Descriptor) else None


def _lasting(name: str, number: int, when_lost: Callable[[OSError], None]) -> io.TextIOBase:
    """What shall stand in place of sys.stdout or sys.stderr, which has that `number`."""
    stream = getattr(sys, name)
    if stream is None:  # whoever started us has closed it
        if _is_open(number):  # a library opened a file meanwhile, which got the number
            number = os.open(os.devnull, os.O_WRONLY)
        else:
            _lead_nowhere(number)
        return io.TextIOWrapper(_Descriptor(number, when_lost), "utf-8", "backslashreplace", write_through=True)
    if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
        return stream
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
    raw = _Descriptor(number, when_lost)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        stream.encoding,
        "senano_jax.spell_out" if stream.errors in ("strict", "surrogateescape") else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _lead_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Handles an error of encoding, as codecs.register_error asks for it."""
    spelling = _SPELLINGS.get(error.object[error.start])
    return (spelling, error.start + 1) if spelling else codecs.backslashreplace_errors(error)


codecs.register_error("senano_jax.spell_out", _spell_out)
