"""The tiles that are tried, the table with made-up times, and programs that run, do not fit or fail."""

import jax.numpy as jnp
import pytest
import tune_matmul
from tune_matmul import CANDIDATES, Shape, Timing, count_wrong, measure, parse_tile, table

from senano_jax.errors import UserError
from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import TILES, Tile

SMALL = Shape(1000, 500, 1000)  # 1 GFLOP


def test_tiles_are_what_their_names_say():
    assert parse_tile("128,192,3,16,b,192") == Tile(128, 192, stages=3, group=16, shared="b", piece=192)
    assert tuple(parse_tile(name) for name in CANDIDATES[: len(TILES)]) == TILES
    assert len({parse_tile(name) for name in CANDIDATES}) == len(CANDIDATES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("128,256", "--tiles 128,256: give ROWS,COLUMNS,STAGES,GROUP,SHARED,PIECE, as in 128,192,4,8,b,64"),
        ("128,128,five,8,a,128", "--tiles 128,128,five,8,a,128: invalid literal"),
        ("128,128,9,8,a,128", "--tiles 128,128,9,8,a,128: a tile takes 360448 bytes"),
    ],
)
def test_a_tile_that_cannot_be_is_named(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tune_matmul.main(["--tiles", text])


def test_needs_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: False)
    with pytest.raises(UserError, match=r"needs a Hopper GPU .* here are .*: run this on an H100 or H200$"):
        tune_matmul.main([])


def test_a_row_has_its_speed_and_its_share_of_the_plain_products():
    fast, slow = CANDIDATES[:2]
    title, head, *rows = table(
        SMALL, "forward", {fast: Timing(2.5, 7), slow: "failed: too many registers", "dot": Timing(2.0, 0)}
    )
    assert title == "forward, [1000, 500] x [500, 1000]"
    assert head.split() == ["us", "TFLOP/s", "of", "dot", "wrong"]
    assert [row.split() for row in rows] == [
        ["dot", "2.0", "500", "1.000", "0"],
        [fast, "2.5", "400", "0.800", "7"],
        [slow, "failed:", "too", "many", "registers"],
    ]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_run_do_not_fit_or_fail(direction):
    """Without a Hopper GPU no tile can be compiled."""
    if hopper_matmul.runs_here():
        pytest.skip("here the tiles run")
    wide, square = CANDIDATES[:2]
    found = measure(Shape(256, 64, 256), direction, ["dot", "unfused", wide, square], repetitions=2)
    assert found["dot"].us > 0 and found["unfused"].us > 0 and found["unfused"].wrong == 0
    assert found[wide] == "does not divide this shape"
    assert found[square].startswith("failed: ")


def test_numbers_further_than_roundings_are_counted():
    expected = jnp.array([1.0, 2.0, 3.0, 0.0], jnp.bfloat16)
    assert count_wrong(expected * (1 + 2.0**-7), expected) == 0
    assert count_wrong(jnp.array([1.0, 2.1, jnp.nan, 0.0], jnp.bfloat16), expected) == 2
