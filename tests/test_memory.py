"""How finely a step is split so that it fits in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from senano_jax.config import changed
from senano_jax.errors import UserError
from senano_jax.model.build import make_model
from senano_jax.optim.recipe import make_optimizer
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.training.memory import activation_bytes, choose_micro_batches, memory_budget, state_bytes
from senano_jax.training.mesh import make_mesh
from senano_jax.training.state import TrainState, abstract_state

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


def test_blocks_of_attention_over_depth_are_kept():
    """Of wide-recurrent with four layers a block: eight blocks, seven times one longer, and one more by application."""
    config = preset("wide-recurrent")
    without, with_blocks = (
        activation_bytes(changed(config, {"model.trunk.depth_block": block}).model, "bfloat16", 1024)
        for block in (None, 4)
    )
    assert with_blocks - without == (8 * 7 + 28) * 1024 * 896 * 2


@pytest.mark.parametrize(("remat", "kept"), [("none", 7), ("full", 0)])
def test_heads_of_a_second_attention_are_kept_unless_they_are_computed_again(remat, kept):
    """Of wide-recurrent in three of its layers, of which two are applied three times."""
    config = changed(preset("wide-recurrent"), {"model.remat": remat})
    without, with_second = (
        activation_bytes(changed(config, {"model.difference": layers}).model, "bfloat16", 1024)
        for layers in ((), (1, 2, 9))
    )
    assert with_second - without == (1 + 2 * 3) * kept * 1024 * 896 * 2


def test_a_sequence_that_does_not_fit_is_refused():
    """With what it takes and what there is; unless the split was asked for."""
    config = preset("recurrent")
    with pytest.raises(
        UserError, match=r"--seq-len 24576 takes about 25\.\d GiB .* has 10\.0 GiB; use --model.remat full"
    ):
        choose_micro_batches(Plan(config), 1, 10 * GIB)
    assert choose_micro_batches(Plan(dataclasses.replace(config, micro_batches=16)), 1, 10 * GIB) == (16,)


def test_each_stage_is_split_by_itself():
    """Sequences of the ramp take 16.9 GiB; of 8, 16 and 24 three fit, so two of the 8 and 16, and three of the 24."""
    plan = Plan(preset("batch-ramp"))
    assert choose_micro_batches(plan, 1, 55 * GIB) == (4, 8, 8)
    assert choose_micro_batches(plan, 8, 55 * GIB) == (1, 1, 1)


def test_a_state_takes_the_bytes_of_its_arrays_on_every_device():
    shapes = {"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "b": jax.ShapeDtypeStruct((7,), jnp.float32)}
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, {"m": shapes["b"]})
    for devices in (1, 4):
        assert state_bytes(state, make_mesh(devices)) == 4 + 30 + 28 + 28


@pytest.mark.parametrize(
    ("name", "on_80_gb", "on_24_gib_of_a_cpu"),
    [
        ("recurrent", 8, None),
        ("no-value-embeddings", 4, 16),
        ("value-embeddings", 4, None),
        ("llmc", 8, 16),
        ("demo", 1, 1),
    ],
)
def test_the_presets_are_split_as_they_have_been(name, on_80_gb, on_24_gib_of_a_cpu, monkeypatch):
    """On one device, of which JAX takes three quarters (a GPU) or all (a CPU); None: refused."""
    config, mesh = preset(name), make_mesh(1)
    state = abstract_state(make_model(config.model, config.dtype), make_optimizer(config.optimizer, config.steps))
    for total, micro_batches in ((0.75 * 79.6 * GIB, on_80_gb), (24 * GIB, on_24_gib_of_a_cpu)):
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(total) // 4096}
        monkeypatch.setattr("senano_jax.training.memory.os.sysconf", pages.get)
        budget = memory_budget(state, mesh)
        if micro_batches is None:
            with pytest.raises(UserError, match=r"use --model\.remat full"):
                choose_micro_batches(Plan(config), 1, budget)
        else:
            assert choose_micro_batches(Plan(config), 1, budget) == (micro_batches,)
