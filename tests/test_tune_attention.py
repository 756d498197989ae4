"""What is tried, in which order, and the lines of the best, from made-up times."""

from types import SimpleNamespace

import pytest
import tune_attention
from tune_attention import Row, candidates, verdict

from senano_jax.errors import UserError


def arguments(**changes):
    sweep = {"kernels": ["forward", "dq", "dkv"], "queries": [32, 64], "keys": [64], "warps": [4], "stages": [2, 3]}
    return SimpleNamespace(**{"only": None, "width": 128, "heads": 6} | sweep | changes)


def test_defaults_come_first_and_once():
    assert candidates(arguments(implementation="hopper")) == [
        ("forward", (4,)), ("dq", (3,)), ("dkv", (3,)),
        ("forward", (2,)), ("forward", (3,)), ("dq", (2,)), ("dkv", (2,)),
    ]  # fmt: skip
    flash = candidates(arguments(implementation="flash"))
    assert flash[:3] == [("forward", (64, 64, 4, 3)), ("dq", (64, 64, 4, 2)), ("dkv", (64, 64, 4, 2))]
    assert len(set(flash)) == len(flash) == 8  # with 4 warps, 32 queries are too few rows; dkv's rows are keys


def test_only_those_named_follow_the_defaults():
    named = arguments(implementation="hopper", kernels=["dq"], only=["dq:4", "dq:3"])
    assert candidates(named) == [("dq", (3,)), ("dq", (4,))]


@pytest.mark.parametrize("name", ["dq", "dq:", "dq:3x3", "dq:three", "dv:3"])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(UserError, match=rf"--only {name}: give KERNEL:STAGES, KERNEL of forward, dq, dkv$"):
        tune_attention.main(["--implementation", "hopper", "--only", name])


def test_the_best_of_each_kernel_and_of_all():
    rows = [
        Row("forward", (4,), [0.1, 0.3]),
        Row("forward", (3,), [0.2, 0.1]),
        Row("dq", (3,), [0.1, 0.1]),
        Row("dkv", (1,), error="out of memory"),
        Row("dkv", (3,), [0.2, 0.3]),
    ]
    args, pairs = arguments(implementation="hopper"), [10_000_000, 20_000_000]
    assert verdict(args, rows, pairs)[-4:] == [
        "best forward 3 0.2000 0.1000",
        "best dq 3 0.1000 0.1000",
        "best dkv 3 0.2000 0.3000",
        "best forward and backward, TFLOP/s: 215 430",  # 14 * 128 * 6 FLOPs a pair in 0.5 ms
    ]
    assert verdict(args, rows[:4], pairs)[-2:] == ["best dq 3 0.1000 0.1000", "best dkv 1 out of memory"]
