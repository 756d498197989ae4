"""Validation loss: the plain mean over the first tokens of the validation shards."""

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from senano_jax.config import Config
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import validation_sequences
from senano_jax.model.build import Model, Params
from senano_jax.training.mesh import place_sequences
from senano_jax.training.step import make_eval_step

TOKENS_AT_A_TIME = 65_536  # on a device, unless one sequence is longer: short ones by themselves leave a GPU waiting


class Evaluator:
    """Evaluates weights on a fixed set of sequences, a long one or a group of short ones on each device at a time."""

    def __init__(self, model: Model, mesh: Mesh, sequences: Int32[np.ndarray, "N T+1"], at_a_time: int | None = None):
        """`at_a_time` sequences on a device, a divisor of N; by default what `group_size` says."""
        self._step = make_eval_step(model, mesh)
        self._mesh = mesh
        count, width = sequences.shape
        at_a_time = group_size(count, width - 1, mesh.size) if at_a_time is None else at_a_time
        self._groups = sequences.reshape(-1, at_a_time, width)

    @property
    def tokens(self) -> int:
        """Tokens that the loss is a mean over."""
        groups, size, length = self._groups.shape
        return groups * size * (length - 1)

    @property
    def rounds(self) -> int:
        """How many times all devices are given a group."""
        return -(-len(self._groups) // self._mesh.size)

    def __call__(self, params: Params, window_blocks: int) -> float:
        """Mean cross-entropy over all tokens, in nats; waits for the devices."""
        losses = []
        for first in range(0, len(self._groups), self._mesh.size):
            rows, weights = self._local_rows(first)
            losses.append(
                self._step(
                    params,
                    place_sequences(self._mesh, rows),
                    place_sequences(self._mesh, weights),
                    np.int32(window_blocks),
                )
            )
        return float(np.sum(np.asarray(jax.device_get(losses), np.float64))) / self.tokens

    def _local_rows(self, first: int):
        """This process's sequences of the round that begins at group `first`, and for each device 1 or 0: do its own
        count?"""
        local = self._mesh.size // jax.process_count()
        wanted = first + local * jax.process_index() + np.arange(local)
        counts = wanted < len(self._groups)
        rows = self._groups[np.where(counts, wanted, 0)]
        return rows.reshape(-1, rows.shape[-1]), counts.astype(np.float32)


def group_size(count: int, length: int, devices: int) -> int:
    """How many of `count` sequences of `length` tokens a device evaluates at a time: as many as make equal groups, one
    for each device at least."""
    sizes = [n for n in range(1, TOKENS_AT_A_TIME // length + 1) if count % n == 0 and count // n >= devices]
    return max(sizes, default=1)


def make_evaluator(config: Config, model: Model, mesh: Mesh) -> Evaluator:
    """Raises UserError if the validation shards are unsound or too short."""
    data = config.data
    shards = find_shards(data.val_files)
    return Evaluator(model, mesh, validation_sequences(data.val_files, shards, data.val_tokens, data.val_seq_len))
