"""The next stage's step, compiled while this one's trains.

Stages of other sequences or another batch run programs of their own, each of which takes as long to lower and compile
as the first one. A thread does so from the first step of the stage before on, and puts it where the run looks for
compiled steps, so that devices wait for what is left of it. A process that ends meanwhile waits for it, its run saved.

XLA times kernels on the devices while it compiles, with arrays in the same memory. One of them in the middle of what is
free leaves no room for the temporaries of a running step that take more than half of it, and the run would end. So the
step is compiled ahead only where they fit in twice; loaded, if the cache has it, it always is.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax

from senano_jax.profiling.compilation import planned_memory
from senano_jax.training.memory import device_bytes
from senano_jax.training.state import TrainState
from senano_jax.training.step_cache import StepCache, compiled_step
from senano_jax.training.wiring import Wiring

_TIMED_BYTES = 2 * 2**30  # for the arrays of what XLA times
_log = logging.getLogger(__name__)


class NextStage:
    """Of a run whose compiled steps `cache` keeps; without one it does nothing."""

    def __init__(self, wiring: Wiring, cache: StepCache | None):
        self._wiring, self._cache = wiring, cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next stage")
        self._compiling: Future | None = None

    def begin(self, index: int, running: jax.stages.Compiled, state: TrainState, tokens: jax.Array) -> None:
        """Starts to load or compile the step of stage `index`, unless the run has no such stage or devices have no room
        to compile it beside `running`, the compiled step of the stage before; returns at once.

        `state` and `tokens` are those of a step of the stage before: all states are alike, and all batches of one type
        and split alike.
        """
        if self._cache is None or index >= len(self._wiring.plan.stages):
            return
        stage, micro_batches = self._wiring.plan.stages[index], self._wiring.micro_batches[index]
        shape = (micro_batches, stage.sequences // micro_batches, stage.seq_len + 1)
        arguments = (
            jax.tree.map(_abstract, state),
            jax.ShapeDtypeStruct(shape, tokens.dtype, sharding=tokens.sharding),
            *self._wiring.plan.inputs(stage.first),
        )
        step = self._wiring.train_steps[index]
        self._compiling = self._thread.submit(self._compile, running, step, stage.visits, arguments)

    def wait(self) -> None:
        """Until what has begun is compiled, or has failed: the run will meet the error again."""
        if self._compiling is not None:
            wait([self._compiling])
            self._compiling = None

    def _compile(self, running: jax.stages.Compiled, step: Callable, visits: int | None, arguments: tuple) -> None:
        try:
            if has_room_beside(running, device_bytes(self._wiring.mesh)):
                compiled_step(step, visits, arguments, self._cache)
            elif self._cache.find(self._cache.path(visits, arguments), arguments) is None:
                _log.debug("the step of the next stage is not compiled ahead: the devices' memory is too small")
        except Exception:
            _log.debug("the step of the next stage was not compiled ahead", exc_info=True)
            raise

    def close(self) -> None:
        """Does not wait: nobody needs the next step of a run that ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def has_room_beside(running: jax.stages.Compiled, device: int) -> bool:
    """Whether kernels can be timed while `running` trains on devices with `device` bytes; not if nobody can tell."""
    memory = planned_memory(running)
    if memory is None:
        return False
    kept = memory.arguments + memory.outputs - memory.aliased
    return kept + 2 * memory.temporaries + _TIMED_BYTES <= device


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding, weak_type=array.aval.weak_type)
