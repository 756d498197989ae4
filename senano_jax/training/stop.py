"""Requests to stop: the first SIGTERM or SIGINT is noted, so that the run can save; the second ends it at once."""

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context manager within which `received` becomes the name of the first signal."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # no clean-up: a checkpoint half written is without its final name
        self.received = signal.Signals(number).name
