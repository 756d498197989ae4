"""How finely each step must be split to fit in the devices' memory."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from senano_jax.config import Config, ModelConfig
from senano_jax.config_check import check_split
from senano_jax.errors import UserError
from senano_jax.model.build import count_parameters
from senano_jax.model.config import TransformerConfig
from senano_jax.model.schedule import Weighted
from senano_jax.model.squared_relu import is_fused
from senano_jax.plan import Plan, PlannedStage
from senano_jax.training.state import TrainState, state_shardings

# Bytes of activations a token needs for each application of a layer, unit of width and byte of the activations' type:
# XLA's temporaries of the full-width step on an H200 (docs/performance.md), rounded up. GPT-2 has not been measured
# there; compiled for a CPU its layers take as many as the others.
ACTIVATION_FACTOR = {"none": 24, "attention": 8, "full": 7}
OF_SECOND_HEADS = {"none": 7, "attention": 7, "full": 0}  # of those, where a second attention is taken from the first


def choose_micro_batches(plan: Plan, devices: int, budget: int) -> tuple[int, ...]:
    """For each stage `config.micro_batches`, or the fewest equal micro-batches whose activations take no more than
    `budget` bytes of a device.

    Raises UserError if the sequences cannot be dealt out evenly, or if not even one seems to fit.
    """
    wanted = plan.config.micro_batches
    check_split(plan, devices, wanted or 1)
    if wanted is not None:
        return (wanted,) * len(plan.stages)
    return tuple(_fewest(plan.config, stage, devices, budget) for stage in plan.stages)


def _fewest(config: Config, stage: PlannedStage, devices: int, budget: int) -> int:
    sequences = stage.sequences // devices
    fitting = [
        n
        for n in range(1, sequences + 1)
        if sequences % n == 0 and stage_activation_bytes(stage, config.dtype, devices, n) <= budget
    ]
    if not fitting:
        bytes_per_sequence = stage_activation_bytes(stage, config.dtype, devices, sequences)
        raise UserError(
            f"one sequence of --seq-len {stage.seq_len} takes about {bytes_per_sequence / 2**30:.1f} GiB beside the "
            f"weights, a device has {max(budget, 0) / 2**30:.1f} GiB; use --model.remat full, or --micro-batches "
            f"{sequences} to try it nevertheless"
        )
    return fitting[0]


def stage_activation_bytes(stage: PlannedStage, dtype: str, devices: int, micro_batches: int) -> int:
    """Estimate of what a micro-batch of a stage's step keeps on each device, in bytes: of each of its sequences as much
    as of one alone."""
    return stage.sequences // devices // micro_batches * activation_bytes(stage.model, dtype, stage.seq_len)


def activation_bytes(model: TransformerConfig, dtype: str, tokens: int) -> int:
    """Estimate of what one micro-batch of `tokens` tokens keeps for its backward pass, in bytes."""
    itemsize = {"bfloat16": 2, "float32": 4}[dtype]
    factor = ACTIVATION_FACTOR[model.remat]
    hidden = model.mlp_expansion * model.dim
    if isinstance(model, ModelConfig) and model.remat == "none" and is_fused(tokens, model.dim, hidden, dtype):
        factor -= model.mlp_expansion  # one number a hidden unit is kept instead of two
    rows = model.positions * factor + sum(model.attention_differences) * OF_SECOND_HEADS[model.remat]
    if isinstance(model, ModelConfig) and isinstance(model.trunk, Weighted) and model.trunk.depth_block is not None:
        # All blocks each time that one is complete, for the readers after it; and what its block has added, by reader.
        blocks = model.trunk.complete_blocks(model.layers, model.layers.visits)
        rows += blocks * (blocks - 1) + model.positions
    return tokens * rows * model.dim * itemsize


def memory_budget(state: TrainState, mesh: Mesh) -> int:
    """Bytes of a device's memory that activations may take, the least over all processes: 90% of what JAX may use, less
    what is there throughout."""
    budget = int(0.9 * device_bytes(mesh)) - resident_bytes(state, mesh)
    if jax.process_count() > 1:  # all must compile the same program
        budget = int(multihost_utils.process_allgather(np.float32(budget)).min())
    return budget


def resident_bytes(state: TrainState, mesh: Mesh) -> int:
    """What each device holds throughout a step: the (abstract) state and two float32 gradients, those of a micro-batch
    and their sum."""
    return state_bytes(state, mesh) + 2 * 4 * count_parameters(state.params)


def device_bytes(mesh: Mesh) -> int:
    """Bytes of a device's memory that JAX may use. A CPU's memory is shared by its devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host_share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
    return stats.get("bytes_limit", host_share)


def state_bytes(state: TrainState, mesh: Mesh) -> int:
    """What each device holds of an (abstract) state."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(state, mesh)), strict=True)
    return sum(int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf, sharding in pairs)
