"""The table of launches and what wins, with made-up times; and programs that run, do not fit or fail."""

import time

import jax.numpy as jnp
import pytest
import tune_matmul
from tune_matmul import LAUNCHES, Shape, Timing, Tuner, fastest, parse_launch, table, verdict

from senano_jax.errors import UserError
from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import DEFAULT_TILE, Tile

DEFAULT, QUICK, WRONG, LATE = LAUNCHES[:4]
SMALL, LARGE = Shape(1000, 500, 1000), Shape(2000, 500, 1000)  # 1 and 2 GFLOP


def times(shape, direction, **microseconds):
    names = {"dot": "dot", "default": DEFAULT, "quick": QUICK}
    return [Timing(shape, direction, names[name], us) for name, us in microseconds.items()]


def test_launches_are_what_their_names_say():
    assert parse_launch(LAUNCHES[0]) == DEFAULT_TILE
    expected = Tile(128, 256, stages=4, group=16, form="overlapped", shared="b", piece=64, buffers=2, lead=1)
    assert parse_launch("overlapped:128,256,4,16,b,64,2,1") == expected
    assert len({parse_launch(name) for name in LAUNCHES}) == len(LAUNCHES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlapped:128,256", "--launches overlapped:128,256: give FORM:ROWS,COLUMNS,STAGES"),
        ("ping-pong:128,128,five,8,a,128,1,0", "--launches ping-pong:128,128,five,8,a,128,1,0: invalid literal"),
        ("ping-pong:128,128,9,8,a,128,1,0", "--launches ping-pong:128,128,9,8,a,128,1,0: a tile takes 360448 bytes"),
    ],
)
def test_a_launch_that_cannot_be_is_named(text, message):
    with pytest.raises(UserError, match=message):
        tune_matmul.main(["--launches", text])


def test_needs_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: False)
    with pytest.raises(UserError, match=r"needs a Hopper GPU .* here are .*: run this on an H100 or H200$"):
        tune_matmul.main([])


def test_only_right_launches_are_fast():
    timings = [
        Timing(SMALL, "forward", "dot", 5.0),
        Timing(SMALL, "forward", DEFAULT, 12.0),
        Timing(SMALL, "forward", QUICK, 10.0),
        Timing(SMALL, "forward", WRONG, 8.0, wrong=1),
        Timing(SMALL, "forward", LATE, note="no time left"),
        Timing(SMALL, "backward", LATE, 1.0),
    ]
    assert fastest(timings, "forward", 1) == [QUICK]
    assert fastest(timings, "forward", 3) == [QUICK, DEFAULT]


def test_a_row_has_its_speed_and_its_share_of_the_plain_products():
    timings = [
        Timing(SMALL, "forward", DEFAULT, 2.5, wrong=7),
        Timing(SMALL, "forward", "dot", 2.0),
        Timing(SMALL, "forward", LATE, note="failed: too many registers"),
    ]
    title, head, *rows = table(timings)
    assert title == "forward, [1000, 500] x [500, 1000]"
    assert head.split() == ["us", "TFLOP/s", "of", "dot", "wrong"]
    assert [row.split() for row in rows] == [
        ["dot", "2.0", "500", "1.000", "0"],
        [DEFAULT, "2.5", "400", "0.800", "7"],
        [LATE, "failed:", "too", "many", "registers"],
    ]


def test_the_winner_is_fastest_over_all_shapes_together():
    timings = [
        *times(SMALL, "forward", dot=1.0, default=3.0, quick=4.0),
        *times(LARGE, "forward", dot=1.0, default=7.0, quick=4.0),
        *times(SMALL, "backward", quick=1.0),  # the other shape is missing
        *times(LARGE, "backward", dot=9.0),
    ]
    assert verdict(timings) == [
        f"forward: {QUICK} wins with 375 TFLOP/s over all shapes, 1.250 times as fast as the default",
        "backward: no launch is right and timed at every shape",
    ]


def test_programs_run_do_not_fit_or_fail():
    """Without a Hopper GPU the launch cannot be compiled."""
    if hopper_matmul.runs_here():
        pytest.skip("here the launches run")
    shape, other = Shape(256, 64, 256), Shape(64, 64, 64)
    names = ["dot", "unfused", DEFAULT]
    tuner = Tuner(runs=2, repetitions=2, deadline=time.monotonic() + 600)
    tuner.compile([(s, "backward", name) for s in (shape, other) for name in names])
    dot, unfused, failed = tuner.time(shape, "backward", names)
    assert dot.us > 0 and unfused.us > 0 and unfused.wrong == 0
    assert failed.us is None and failed.note.startswith("failed: ")
    assert tuner.time(other, "backward", names)[2].note == "does not divide this shape"
    late = Tuner(runs=1, repetitions=1, deadline=time.monotonic() - 1)
    late.compile([(shape, "backward", name) for name in names])
    assert {t.note for t in late.time(shape, "backward", names)} == {"no unfused result: no time left"}


def test_numbers_further_than_roundings_are_counted():
    expected = jnp.array([1.0, 2.0, 3.0, 0.0], jnp.bfloat16)
    assert tune_matmul._count_wrong(expected * (1 + 2.0**-7), expected) == 0
    assert tune_matmul._count_wrong(jnp.array([1.0, 2.1, jnp.nan, 0.0], jnp.bfloat16), expected) == 2
