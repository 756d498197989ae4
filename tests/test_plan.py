"""What each step of a run is: its batch, its window and the values that the compiled step is given."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from senano_jax.config import Config, Stage, changed, settings
from senano_jax.config_check import check_config, check_split
from senano_jax.config_file import read_config, write_config
from senano_jax.errors import UserError
from senano_jax.model.schedule import Weighted
from senano_jax.plan import Plan, StepInputs, window_blocks
from senano_jax.presets import PRESETS, preset

UNSTAGED = [name for name in PRESETS if not preset(name).stages]


def staged(*stages: Stage, **changes) -> Config:
    """The demo in stages; it has 32 steps of 4 sequences of 1,024 tokens."""
    return changed(preset("demo"), {"stages": stages, **changes})


def ramp() -> Config:
    """Unequal parts, borders that are rounded, and everything that a stage can say but for visits."""
    return staged(
        Stage(part=1, batch_tokens=1024, seq_len=512, rate=0.5, ahead=((1, 1), (0.5, 0.5), (0.25, 0))),
        Stage(part=1.5, batch_tokens=2048, ahead=((1, 1), (0.5, 0))),
        Stage(part=0.75, rate=1.25),
        **{"steps": 30, "data.discard_micro_batch": 7},
    )


@pytest.mark.parametrize("name", UNSTAGED)
def test_a_run_without_stages_is_the_same_from_end_to_end(name):
    """One stage of all steps; the compiled step is given the window and nothing else."""
    config = preset(name)
    plan = Plan(config)
    (stage,) = plan.stages
    assert (stage.first, stage.end, stage.model) == (0, config.steps, config.model)
    assert (stage.batch_tokens, stage.seq_len) == (config.batch_tokens, config.seq_len)
    for step in (0, 1, config.steps // 3, config.steps - 1, config.steps):
        window = window_blocks(step, config.steps, config.final_window_tokens, config.initial_window_tokens)
        assert plan.inputs(step) == StepInputs(np.int32(window), None, None)
        assert plan.evaluation_window(step) == window
        assert plan.tokens_after(step) == step * config.batch_tokens
    assert plan.total_tokens == plan.stream_tokens == config.steps * config.batch_tokens


def test_tokens_are_those_of_the_steps_before():
    """Added one step at a time; skipped tokens are passed between two steps, trained on never."""
    plan = Plan(ramp())
    trained = passed = 0
    for step in range(plan.steps):
        assert plan.tokens_after(step) == trained
        stage = plan.stage(step)
        assert stage.first <= step < stage.end
        assert stage.sequences * stage.seq_len == stage.batch_tokens
        trained += stage.batch_tokens
        passed += stage.batch_tokens + 7 * (step < plan.steps - 1)
    assert (plan.total_tokens, plan.stream_tokens) == (trained, passed)
    assert plan.tokens_after(plan.steps + 1) == trained + 4096  # as a log of a finished run asks
    assert [(s.first, s.end) for s in plan.stages] == [
        (0, 9),
        (9, 23),
        (23, 30),
    ]  # 30 x 1/3.25 = 9.23, 2.5/3.25 = 23.08
    assert plan.longest_sequence == 1024


def test_the_borders_of_the_speed_record():
    """423, 424, 423 steps in thirds and 15 more, 338,821,120 tokens, from its source; and the thirds by themselves."""
    batches = (131_072, 262_144, 393_216)
    thirds = changed(preset("recurrent"), {"seq_len": 16_384, "steps": 1270})
    plan = Plan(changed(thirds, {"stages": tuple(Stage(part=1 / 3, batch_tokens=batch) for batch in batches)}))
    assert [stage.first for stage in plan.stages] == [0, 423, 847]
    parts = zip((423, 424, 423, 15), (*batches, 393_216))
    stages = tuple(Stage(part=part, batch_tokens=batch) for part, batch in parts)
    plan = Plan(changed(thirds, {"steps": 1285, "stages": stages}))
    assert [stage.first for stage in plan.stages] == [0, 423, 847, 1270]
    assert plan.total_tokens == 338_821_120


def test_the_ramp_trains_on_the_tokens_of_the_record():
    """In steps that 1, 2, 4 and 8 devices share; the last stage is the record's own step at its own rates."""
    config = preset("batch-ramp")
    plan = Plan(config)
    assert plan.total_tokens == Plan(preset("recurrent")).total_tokens == 668_467_200
    assert [(s.end - s.first, s.sequences) for s in plan.stages] == [(850, 8), (850, 16), (850, 24)]
    assert [s.rate for s in plan.stages] == pytest.approx([1 / 1.7320508, 1.5157166 / 1.7320508, 1])
    for devices in (1, 2, 4, 8):
        check_split(plan, devices, 1)


def test_weights_of_tokens_ahead_move_through_their_stage():
    """Linearly from one to the other, which the next stage's first step would be the first to have; exact fractions.
    All stages have as many weights, 0 for what they do not look ahead to, so that one program serves them."""
    plan = Plan(ramp())
    for step in range(9):
        last = Fraction(1, 4) * (1 - Fraction(step, 9))
        np.testing.assert_allclose(plan.loss_weights(step), [1, 0.5, float(last)], rtol=1e-7)
    for step in range(9, 23):
        second = Fraction(1, 2) * (1 - Fraction(step - 9, 14))
        np.testing.assert_allclose(plan.loss_weights(step), [1, float(second), 0], rtol=1e-7)
    assert plan.loss_weights(0).dtype == np.float32
    for step in (23, 29):
        np.testing.assert_array_equal(plan.inputs(step).loss_weights, [1, 0, 0])
    assert Plan(preset("batch-ramp")).loss_weights(0) is None


def test_rates_are_given_to_all_steps_or_to_none():
    plan = Plan(ramp())
    assert [float(plan.rate(step)) for step in (0, 8, 9, 22, 23, 29)] == [0.5, 0.5, 1, 1, 1.25, 1.25]
    assert plan.rate(0).dtype == np.float32


def test_the_window_of_evaluations_grows_to_its_own_end():
    """With that of training, which stays; by default it is the same."""
    config = changed(preset("recurrent"), {"evaluation_window_tokens": 2560})
    check_config(config)
    plan, usual = Plan(config), Plan(preset("recurrent"))
    assert (plan.evaluation_window(1700), plan.evaluation_window(0), plan.evaluation_window(850)) == (20, 1, 10)
    assert [plan.window(step) for step in (0, 850, 1700)] == [usual.evaluation_window(step) for step in (0, 850, 1700)]


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (staged(Stage(part=0)), ["--stages.0.part is 0", "above 0"]),
        (staged(Stage(part=float("nan"))), ["--stages.0.part is nan"]),
        (staged(Stage(part=1), Stage(part=0.01)), ["--stages.1.part 0.01", "not one of the --steps 32"]),
        (staged(Stage(part=1, batch_tokens=0)), ["--stages.0.batch-tokens is 0; it must be at least 1"]),
        (
            staged(Stage(part=1, batch_tokens=1500)),
            ["--stages.0.batch-tokens 1500", "--seq-len 1024", "nearest is 1024"],
        ),
        (
            staged(Stage(part=1), Stage(part=1, seq_len=1152)),
            ["--batch-tokens 4096", "--stages.1.seq-len 1152", "4608"],
        ),
        (staged(Stage(part=1, seq_len=1000)), ["--stages.0.seq-len 1000", "multiple of 128"]),
        (
            staged(Stage(part=1), Stage(part=1, seq_len=256)),
            ["--stages.1.seq-len 256", "512 tokens at the end of stage 1"],
        ),
        (staged(Stage(part=1, rate=-1.0)), ["--stages.0.rate is -1.0", "0 or more"]),
        (staged(Stage(part=1, ahead=((1, 1), (float("inf"), 0)))), ["--stages.0.ahead holds inf"]),
        (staged(Stage(part=1, visits=4)), ["--stages.0.visits 4", "skips pair", "leave it out"]),
        (staged(Stage(part=1, visits=3), **{"model.trunk": Weighted()}), ["--stages.0.visits 3", "1 to 2 visits"]),
        (changed(preset("llmc"), {"stages": (Stage(part=1, visits=1),)}), ["--stages.0.visits 1", "no loop"]),
        (staged(evaluation_window_tokens=0), ["--evaluation-window-tokens is 0"]),
        (staged(evaluation_window_tokens=8192), ["--evaluation-window-tokens 8192", "--data.val-seq-len 4096"]),
        (
            staged(initial_window_tokens=256, evaluation_window_tokens=128),
            ["--initial-window-tokens 256", "--evaluation-window-tokens 128", "only grows"],
        ),
    ],
)
def test_stages_that_cannot_work_are_refused_in_one_line(config, fragments):
    with pytest.raises(UserError) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_loop_of_weighted_applications_may_be_visited_less_often():
    config = staged(Stage(part=1, visits=1), Stage(part=1), **{"model.trunk": Weighted()})
    check_config(config)
    assert [stage.model.positions for stage in Plan(config).stages] == [4, 6]


def test_a_short_sequence_may_be_one_of_a_short_window():
    """The window is within the sequences of every stage while it lasts: 256 of the final 512 tokens at half the run."""
    check_config(staged(Stage(part=1, seq_len=256), Stage(part=1)))


def test_a_stage_that_devices_cannot_share_is_refused_by_its_own_flag():
    with pytest.raises(UserError, match=r"a step of 2 sequences \(--stages.1.batch-tokens / --seq-len\) .* 4 devices"):
        check_split(Plan(staged(Stage(part=1), Stage(part=1, batch_tokens=2048))), 4, 1)


def test_stages_are_read_back_and_compared_value_by_value(tmp_path):
    config = ramp()
    write_config(tmp_path / "config.json", config, "demo", 1)
    assert read_config(tmp_path / "config.json") == (config, "demo")
    other = dataclasses.replace(config, stages=(config.stages[0], changed(config.stages[1], {"rate": 2.0})))
    ours, theirs = settings(config), settings(other)
    different = {name for name in ours if ours[name] != theirs.get(name)}
    assert different == {
        "stages",
        "stages.1.rate",
        "stages.2.part",
        "stages.2.rate",
        "stages.2.ahead",
    }
