"""The devices of a run, and how a batch lies on them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from senano_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: int | None) -> Mesh:
    """A one-dimensional mesh over the first `devices` devices, or all; raises UserError if there are fewer."""
    available = jax.devices()
    count = len(available) if devices is None else devices
    if count != len(available) and jax.process_count() > 1:
        raise UserError(f"--devices {count}: a run of several processes uses all of their {len(available)} devices")
    if count > len(available):
        raise UserError(f"--devices {count}: this machine has {len(available)} {available[0].platform} devices")
    return Mesh(np.asarray(available[:count]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of an array that each device holds all of."""
    return NamedSharding(mesh, P())


def place_batch(mesh: Mesh, sequences: np.ndarray, micro_batches: int) -> jax.Array:
    """Puts this process's sequences [S, T+1] on its devices as [micro_batches, all sequences / micro_batches, T+1].

    Which micro-batch a sequence falls into does not matter: a step is a sum over all of them.
    """
    split = sequences.reshape(micro_batches, -1, sequences.shape[-1])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, DATA_AXIS)), split)


def place_sequences(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Puts this process's rows on its devices along the first axis."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(DATA_AXIS)), rows)
