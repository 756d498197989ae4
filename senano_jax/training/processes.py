"""Runs of several processes: joining them, refusing as one, and agreeing on when to stop."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from senano_jax.errors import UserError
from senano_jax.training.lost_peer import filter_standard_error
from senano_jax.training.mesh import DATA_AXIS, place_sequences

# Set by a launcher in each process it starts: srun, mpirun, or a person.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
_REFUSAL_BYTES = 1024
_SILENCE_S = 40  # a process that JAX has not heard of for so long is gone, and the others end
_OF_OTHERS = re.compile("gloo|nccl|communicator|collective|coordination|barrier", re.IGNORECASE)


def join_processes(run_dir: str | None = None) -> None:
    """Connects this process with the others of its Slurm step or Open MPI job, or those that JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. Does nothing for a process on its own.

    From then on it ends when one of the others is gone, with a line that names it and the command that resumes the run
    in `run_dir`. To be called before JAX looks for devices. Raises UserError if the others cannot be found.
    """
    try:
        if all(int(os.environ.get(name) or 1) <= 1 for name in _COUNTS):
            return
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"):
            if "JAX_NUM_PROCESSES" in os.environ and name not in os.environ:
                raise UserError(f"JAX_NUM_PROCESSES is set, and {name} is not; set both in every process")
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
        filter_standard_error(run_dir)
        if "JAX_NUM_PROCESSES" in os.environ:  # and JAX_LOCAL_DEVICE_IDS, if the process shall not have them all
            jax.distributed.initialize(
                os.environ["JAX_COORDINATOR_ADDRESS"],
                int(os.environ["JAX_NUM_PROCESSES"]),
                int(os.environ["JAX_PROCESS_ID"]),
                cluster_detection_method="deactivate",  # a Slurm job around them would choose the devices
                heartbeat_timeout_seconds=_SILENCE_S,
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE_S)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes ({' '.join(str(error).split())[:150]})") from None


@contextlib.contextmanager
def leave_at_once_on_failure() -> Iterator[None]:
    """Ends a process of several without waiting for the others, if it fails: they would wait for it too."""
    try:
        yield
    except BaseException as failure:
        status = failure.code if isinstance(failure, SystemExit) else 1
        if status and jax.distributed.is_initialized():
            if not isinstance(failure, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            if jax.process_index() == 0:
                time.sleep(5)  # with it goes what connects the others, who may be about to say why they leave
            os._exit(status if isinstance(status, int) else 1)
        raise


@contextlib.contextmanager
def cause_first() -> Iterator[None]:
    """Holds back a failure of what processes do together: if one of them is gone, that is the cause, and JAX ends this
    process with a line about it."""
    try:
        yield
    except Exception as failure:
        causes = (str(error) for error in _chain(failure) if not isinstance(error, UserError))
        if jax.distributed.is_initialized() and any(map(_OF_OTHERS.search, causes)):
            time.sleep(1.5 * _SILENCE_S)
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses, all refuse: a UserError raised within, in any of them, is raised in each on leaving.

    All must come here, and nothing within may wait for the others. It is the error of the first process that has one.
    """
    refusal = ""
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        refusal = str(error)
    if jax.process_count() > 1:
        mine = np.zeros(_REFUSAL_BYTES, np.uint8)
        text = refusal.encode(errors="replace")[:_REFUSAL_BYTES]
        mine[: len(text)] = list(text)
        for said in multihost_utils.process_allgather(mine):
            if said.any():
                raise UserError(said.tobytes().rstrip(b"\0").decode(errors="ignore"))


def of_first_process(numbers: list[int]) -> list[int]:
    """The `numbers` of process 0, in every process."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.asarray(numbers or [0], np.int32), count)  # of the right size; only process 0's count
    return multihost_utils.broadcast_one_to_all(mine).tolist()


class StopVote:
    """Lets all processes stop after the same step, although a signal reaches them at different moments or only one."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._local_devices = len(mesh.local_devices)
        count = jax.shard_map(
            lambda x: jax.lax.psum(x.sum(), DATA_AXIS), mesh=mesh, in_specs=P(DATA_AXIS), out_specs=P()
        )
        self._count = jax.jit(count)

    def __call__(self, stop: bool) -> jax.Array | bool:
        """How many devices belong to processes that want to stop; an array on the devices, or `stop` itself in a run
        of one process."""
        if jax.process_count() == 1:
            return stop
        return self._count(place_sequences(self._mesh, np.full(self._local_devices, stop, jnp.int32)))
