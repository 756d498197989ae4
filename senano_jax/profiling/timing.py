"""Step times: one at a time, and back to back as the training loop runs them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from senano_jax.model.build import Params
from senano_jax.plan import StepInputs
from senano_jax.profiling.tokens import Feed
from senano_jax.training.mesh import place_batch
from senano_jax.training.state import TrainState


@dataclass(frozen=True)
class Spread:
    """Of a sample of times, in milliseconds."""

    median: float
    min: float
    p10: float
    p90: float
    max: float
    n: int
    times: tuple[float, ...]

    @classmethod
    def of(cls, milliseconds: Iterable[float]) -> "Spread":
        """Of at least one time, in milliseconds."""
        times = tuple(map(float, milliseconds))
        low, p10, median, p90, high = (float(q) for q in np.percentile(times, [0, 10, 50, 90, 100]))
        return cls(median, low, p10, p90, high, len(times), times)


class StepRunner:
    """Runs a compiled training step on batches of a feed and carries the donated state along. `inputs` are those of
    every step, but for the window."""

    def __init__(
        self,
        program: jax.stages.Compiled,
        inputs: StepInputs,
        state: TrainState,
        mesh: Mesh,
        micro_batches: int,
        feed: Feed,
    ):
        self._program = program
        self._inputs = inputs
        self._state = state
        self._mesh = mesh
        self._micro_batches = micro_batches
        self._feed = feed

    def steps(self, count: int, window: int, program: jax.stages.Compiled | None = None) -> None:
        """Queues `count` steps and waits for them; of another compilation of the same step, if given."""
        for _ in range(count):
            self._queue(self._place(), window, program)
        jax.block_until_ready(self._state)

    def synchronised(self, count: int, window: int) -> Spread:
        """Each step waited for before the next one is queued; its batch lies on the devices already."""
        times = []
        for _ in range(count):
            tokens = jax.block_until_ready(self._place())
            start = time.perf_counter()
            metrics = self._queue(tokens, window)
            jax.block_until_ready((self._state, metrics))
            times.append(1000 * (time.perf_counter() - start))
        return Spread.of(times)

    def pipelined(self, count: int, window: int) -> tuple[Spread, Spread]:
        """As the training loop: a step is read once the next one is queued. Times of a step, and of the host in it."""
        finished, host, running = [], [], None
        for _ in range(count + 2):
            start = time.perf_counter()
            metrics = self._queue(self._place(), window)
            for value in metrics:
                value.copy_to_host_async()
            host.append(1000 * (time.perf_counter() - start))
            if running is not None:
                float(running.loss)
                finished.append(1000 * time.perf_counter())
            running = metrics
        # Not counted: nothing was queued behind it. A call can return long after the step before it has finished, since
        # a GPU takes some thousand kernels ahead at most, so that all times but this one are as late as that.
        float(running.loss)
        return Spread.of(np.diff(finished)), Spread.of(host)

    @property
    def params(self) -> Params:
        """The weights after the newest step."""
        return self._state.params

    def _place(self) -> jax.Array:
        return place_batch(self._mesh, next(self._feed.batches), self._micro_batches)

    def _queue(self, tokens: jax.Array, window: int, program: jax.stages.Compiled | None = None):
        inputs = self._inputs._replace(window_blocks=np.int32(window))
        self._state, metrics = (program or self._program)(self._state, tokens, *inputs)
        return metrics
