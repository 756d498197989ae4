"""How finely a step is split so that it fits in memory."""

import dataclasses

import pytest

from senano_jax.errors import UserError
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.training.memory import activation_bytes, choose_micro_batches

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "available", "devices", "micro_batches"),
    [
        ("recurrent", 92 * GIB, 1, 8),
        ("recurrent", 92 * GIB, 8, 1),
        ("no-value-embeddings", 92 * GIB, 1, 2),
        ("value-embeddings", 92 * GIB, 1, 2),
        ("llmc", 92 * GIB, 1, 4),  # 128 of 512 sequences at a time
        ("llmc", 92 * GIB, 8, 1),
        ("llmc", 1 * GIB, 1, 256),  # two of them
    ],
)
def test_the_fewest_micro_batches_that_fit_are_chosen(name, available, devices, micro_batches):
    """They divide the sequences of a device, and half as many would not fit."""
    config = preset(name)
    assert choose_micro_batches(Plan(config), devices, available) == (micro_batches,)
    sequences = config.batch_sequences // devices

    def needed(n):
        return activation_bytes(config.model, config.dtype, sequences // n * config.seq_len)

    assert needed(micro_batches) <= available
    assert micro_batches == 1 or needed(micro_batches // 2) > available


def test_a_sequence_that_does_not_fit_is_refused():
    """With what it takes and what there is; unless the split was asked for."""
    config = preset("recurrent")
    with pytest.raises(
        UserError, match=r"--seq-len 24576 takes about 25\.\d GiB .* has 10\.0 GiB; use --model.remat full"
    ):
        choose_micro_batches(Plan(config), 1, 10 * GIB)
    assert choose_micro_batches(Plan(dataclasses.replace(config, micro_batches=16)), 1, 10 * GIB) == (16,)
