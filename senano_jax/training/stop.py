"""Requests to stop: the first signal is noted, so that the run can save; SIGTERM or SIGINT again ends it at once."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ONE_REQUEST_S = 0.1  # a launcher and a terminal may each pass on the signal that both got


class Stopped(KeyboardInterrupt):
    """A run was told to stop, and has saved. Not an `Exception`, so that what would start the next run ends too."""

    def __init__(self, run_dir: Path, reason: str):
        super().__init__(f"{reason}: the run in {run_dir} was stopped and is saved")
        self.run_dir = run_dir


class StopRequest:
    """A context manager within which `received` becomes the name of the first signal, and a line says so at once.

    A closed terminal (SIGHUP) asks once however often it is told, and not at all where it was ignored before (nohup).
    Outside the main thread, which alone gets signals, nothing changes.
    """

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._stack = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._watch()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _watch(self) -> None:
        """Python runs handlers between two of its own instructions, which can be minutes away while a program is
        compiled. What the interpreter does at once is to write the number of the signal into a pipe."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        watcher = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        watcher.start()
        self._stack.callback(os.close, reading)
        self._stack.callback(watcher.join)
        self._stack.callback(os.close, writing)
        self._stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._stack.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self, reading: int) -> None:
        told, asked = False, None  # when SIGTERM or SIGINT came first
        while numbers := os.read(reading, 1):
            number, now = numbers[0], time.monotonic()
            if number not in _SIGNALS:  # somebody else's
                continue
            self._note(number, None)
            if not told:
                again = "" if number == signal.SIGHUP else "; again: ends at once"
                _tell(f"{self.received}: finishing the step under way, then saving{again}")
                told = True
            if number == signal.SIGHUP:
                continue
            if asked is None:
                asked = now
            elif now - asked > _ONE_REQUEST_S:
                os._exit(128 + number)  # no clean-up: a checkpoint half written is without its final name


def _tell(line: str) -> None:
    """On standard error, past every buffer and lock; on a terminal in place of the live line, which comes again."""
    with contextlib.suppress(OSError):
        os.write(2, (("\r\x1b[2K" if os.isatty(2) else "") + line + "\n").encode())
