"""Schedules over a run, against the PyTorch program's formulas and at their ends."""

import dataclasses
from fractions import Fraction
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_gpt2 import cosine_lr

from senano_jax.optim.config import Cooldown
from senano_jax.optim.schedules import learning_rate_factor, ramp
from senano_jax.plan import window_blocks
from senano_jax.presets import preset

OPTIMIZER = preset("recurrent").optimizer
SCHEDULE, MOMENTUM = OPTIMIZER.schedule, OPTIMIZER.matrices.momentum


def published_factor(step, steps):
    x = step / steps
    if x < 1 - 0.4:
        return 1.0
    w = (1 - x) / 0.4
    return w * 1.0 + (1 - w) * 0.1


def published_momentum(step):
    fraction = min(step / 300, 1)
    return (1 - fraction) * 0.85 + fraction * 0.95


def published_window(step, steps):
    """The next multiple of 128 at or above 1728 x progress, in blocks; the model's own floor of one block."""
    tokens = 1728 * (step / steps)
    multiple = next(m for m in range(128, int(tokens) + 1 + 128, 128) if m >= tokens)
    return multiple // 128


@pytest.mark.parametrize("steps", [6, 200, 1700])
def test_learning_rates_are_constant_then_fall_linearly(steps):
    """Traced like in the step: one compilation for all of them, float32."""
    factor = jax.jit(lambda step: learning_rate_factor(step, steps, SCHEDULE))
    for step in range(0, steps + 1, max(1, steps // 50)):
        assert float(factor(step)) == pytest.approx(published_factor(step, steps), abs=1e-6)
    assert factor(0).dtype == jnp.float32
    assert factor(0) == 1.0
    assert float(factor(steps)) == pytest.approx(0.1, abs=1e-6)


def test_the_cooldown_begins_at_60_percent():
    """Exactly 1 up to step 1020 of 1700, less from the next one on."""
    assert [float(learning_rate_factor(step, 1700, SCHEDULE)) for step in (1019, 1020)] == [1.0, 1.0]
    assert float(learning_rate_factor(1021, 1700, SCHEDULE)) < 1


def test_without_cooldown_the_rate_stays():
    """A fraction of 0 divides nothing by zero: 1 at every step that is taken."""
    constant = dataclasses.replace(SCHEDULE, fraction=0.0)
    for schedule in (constant, Cooldown(fraction=0.0, floor=1.0)):
        assert {float(learning_rate_factor(step, 10, schedule)) for step in range(10)} == {1.0}
        assert learning_rate_factor(np.arange(10), 10, schedule).tolist() == [1.0] * 10


@pytest.mark.parametrize("steps", [701, 2000, 20_000])
def test_llmc_warms_up_and_falls_as_a_cosine(steps):
    """1/700 at step 0, 1 from step 699 on, half at the middle of the rest, and 0 at the end: 6e-4 times that is the
    published rate."""
    config = preset("llmc").optimizer
    factor = jax.jit(lambda step: learning_rate_factor(step, steps, config.schedule))
    for step in (*range(0, 702, 50), 699, 700, *range(700, steps + 1, max(1, steps // 50)), steps):
        published = cosine_lr(step, steps) / 6e-4
        assert float(factor(step)) == pytest.approx(published, abs=1e-6)
    assert factor(0).dtype == jnp.float32
    assert [float(factor(step)) for step in (699, 700, steps)] == [1, 1, 0]
    assert config.matrices.rate == 6e-4


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    """And one without warm-up begins at the full rate."""
    config = preset("llmc").optimizer.schedule
    assert [float(learning_rate_factor(step, 20, config)) for step in (0, 19)] == pytest.approx([1 / 700, 20 / 700])
    at_once = dataclasses.replace(config, warmup_steps=0)
    assert [float(learning_rate_factor(step, 20, at_once)) for step in (0, 10, 20)] == pytest.approx(
        [1, 0.5, 0], abs=1e-6
    )


@pytest.mark.parametrize("step", [0, 1, 150, 299, 300, 301, 1699])
def test_momentum_warms_up_over_300_steps(step):
    """0.85 at step 0, 0.95 from step 300 on."""
    assert float(jax.jit(lambda s: ramp(s, MOMENTUM))(step)) == pytest.approx(published_momentum(step), abs=1e-7)


def test_without_warm_up_the_momentum_is_the_final_one_after_the_first_step():
    """Zero steps of warm-up divide nothing by zero."""
    at_once = dataclasses.replace(MOMENTUM, warmup_steps=0)
    assert float(ramp(1, at_once)) == pytest.approx(0.95)


@pytest.mark.parametrize("steps", [1700, 1900])
def test_the_window_grows_at_the_very_steps_of_the_pytorch_program(steps):
    """All steps of the two published runs, against its formula and against exact rational arithmetic."""
    windows = [window_blocks(step, steps, 1728) for step in range(steps + 1)]
    assert windows == [published_window(step, steps) for step in range(steps + 1)]
    assert windows == [max(1, ceil(Fraction(1728 * step, 128 * steps))) for step in range(steps + 1)]
    assert (windows[0], windows[1], windows[-1]) == (1, 1, 14)
    assert set(windows) == set(range(1, 15))


def test_a_window_may_start_where_it_ends_or_in_between():
    """llmc's is its whole sequence at every step; one from 512 to 1,024 tokens takes 4 blocks, then up to 8."""
    config = preset("llmc")
    bounds = config.final_window_tokens, config.initial_window_tokens
    assert {window_blocks(step, 100, *bounds) for step in range(101)} == {8} == {config.seq_len // 128}
    assert [window_blocks(step, 4, 1024, 512) for step in range(5)] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("steps", [1, 6, 95, 200])
def test_the_window_of_other_runs(steps):
    """Short runs reach the same window, in larger strides; also where progress meets a block exactly."""
    for final in (128, 512, 1728):
        for step in range(steps + 1):
            tokens = final * (step / steps)
            assert window_blocks(step, steps, final) == max(1, ceil(tokens / 128))
