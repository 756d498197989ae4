"""The devices of a run, how a batch lies on them, and how finely each step must be split to fit in their memory."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from senano_jax.config import Config, ModelConfig, check_split
from senano_jax.errors import UserError
from senano_jax.model.squared_relu import is_fused

DATA_AXIS = "data"

# Bytes of activations a token needs for each position, unit of width and byte of the activations' type: XLA's
# temporaries of the full-width step on an H200 (docs/performance.md), rounded up. GPT-2 has not been measured there;
# compiled for a CPU its layers take as many as the others.
ACTIVATION_FACTOR = {"none": 24, "attention": 8, "full": 7}


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


def choose_micro_batches(config: Config, devices: int) -> int:
    """`config.micro_batches`, or the fewest equal micro-batches whose activations fit in a device's free memory.

    Raises UserError if the sequences cannot be dealt out evenly, or if not even one seems to fit.
    """
    if config.micro_batches is not None:
        check_split(config, devices, config.micro_batches)
        return config.micro_batches
    check_split(config, devices, 1)
    sequences = config.batch_sequences // devices
    budget = memory_budget(config, devices)
    if jax.process_count() > 1:  # all must compile the same program
        budget = int(multihost_utils.process_allgather(np.float32(budget)).min())
    bytes_per_sequence = activation_bytes(config, config.seq_len)
    fitting = [
        n for n in range(1, sequences + 1) if sequences % n == 0 and sequences // n * bytes_per_sequence <= budget
    ]
    if not fitting:
        raise UserError(
            f"one sequence of --seq-len {config.seq_len} takes about {bytes_per_sequence / 2**30:.1f} GiB beside the "
            f"weights, a device has {max(budget, 0) / 2**30:.1f} GiB; use --model.remat full, or --micro-batches "
            f"{sequences} to try it nevertheless"
        )
    return fitting[0]


def activation_bytes(config: Config, tokens: int) -> int:
    """Estimate of what one micro-batch of `tokens` tokens keeps for its backward pass, in bytes."""
    model = config.model
    itemsize = {"bfloat16": 2, "float32": 4}[config.dtype]
    factor = ACTIVATION_FACTOR[model.remat]
    hidden = model.mlp_expansion * model.dim
    if isinstance(model, ModelConfig) and model.remat == "none" and is_fused(tokens, model.dim, hidden, config.dtype):
        factor -= model.mlp_expansion  # one number a hidden unit is kept instead of two
    return tokens * model.positions * model.dim * itemsize * factor


def memory_budget(config: Config, devices: int) -> int:
    """Bytes of a device's memory that activations may take: 90% of what JAX may use, less what the weights need.

    A CPU's memory is shared by its devices.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    host_share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    total = stats.get("bytes_limit", host_share)
    return int(0.9 * total) - 20 * config.model.matrix_entries  # float32: weights, two gradients, two moments
