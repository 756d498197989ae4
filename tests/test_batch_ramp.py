"""How the systems for fewer tokens divide their tokens where the batch grows."""

import dataclasses

import pytest

from senano_jax.config import changed
from senano_jax.config_check import check_config
from senano_jax.plan import Plan
from senano_jax.presets import preset


@pytest.mark.parametrize(("changes", "tokens"), [({}, 449_839_104), ({"steps": 6762}, 379_846_656)])
def test_a_ramp_of_three_equal_parts(changes, tokens):
    plan = Plan(changed(preset("difference-recurrent-ramp"), changes))
    assert plan.total_tokens == tokens
    trained = [(stage.end - stage.first) * stage.batch_tokens for stage in plan.stages]
    assert trained == [tokens // 3] * 3


def test_eight_devices_share_every_step_and_rates_go_by_the_root_of_the_batch():
    config = preset("difference-recurrent-ramp")
    check_config(config)
    for stage in Plan(config).stages:
        assert stage.sequences % 8 == 0
        assert stage.rate == pytest.approx((stage.batch_tokens / config.batch_tokens) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["tied-recurrent", "wide-recurrent", "attnres-recurrent"])
def test_the_ramp_changes_nothing_else(name):
    base, ramp = preset(name), preset(name + "-ramp")
    assert dataclasses.replace(ramp, steps=base.steps, stages=base.stages) == base
    assert [stage.ahead for stage in ramp.stages] == [stage.ahead for stage in base.stages]
