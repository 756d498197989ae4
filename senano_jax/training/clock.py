"""Training time: a clock that stops for evaluations, as in the PyTorch program's logs."""

import time


class Clock:
    """Stopped at first, at `milliseconds`: what a resumed run had used before."""

    def __init__(self, milliseconds: float = 0.0):
        self._elapsed = milliseconds / 1000
        self._started: float | None = None

    def start(self) -> None:
        """Goes on."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stands still until it is started again."""
        self._elapsed, self._started = self._seconds(), None

    @property
    def milliseconds(self) -> float:
        """Training time so far."""
        return 1000 * self._seconds()

    def _seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._elapsed + running
