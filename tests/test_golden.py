"""Small versions of the presets give the numbers that they gave when these were written, and same_bits.py tells whether
two revisions give the same bits."""

import importlib
import json
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
bits_probe, golden, same_bits = (importlib.import_module(n) for n in ("bits_probe", "golden_numbers", "same_bits"))

STORED = json.loads(golden.FILE.read_text())
CASES = golden.golden_cases()
# Several times the largest difference between JAX 0.10, 0.11 and 0.12, AVX-512, AVX2 (of two vendors) and SSE4.2. After
# a step of Muon, whose bfloat16 iteration turns last bits into a percent of the step, only losses are as close.
TOLERANCE = {
    "float32": {
        "initial weights": 1e-6, "validation": 1e-5, "gradients": 3e-5, "losses": 5e-5, "gradient norms": 1e-3,
    },
    "bfloat16": {
        "initial weights": 1e-6, "validation": 1e-4, "gradients": 6e-2, "losses": 1e-4, "gradient norms": 1e-2,
    },
}  # fmt: skip


def test_every_preset_has_its_numbers():
    assert set(STORED) == set(CASES)
    assert {case.preset for case in CASES.values()} == set(bits_probe.SYSTEMS)


@pytest.mark.parametrize("name", STORED)
def test_presets_compute_what_they_did(name):
    found = golden.deviations(STORED[name], golden.numbers_of(bits_probe.measure(CASES[name])))
    tolerance = TOLERANCE[CASES[name].dtype]
    assert found.keys() == tolerance.keys()
    assert {what: gap for what, gap in found.items() if not gap[0] <= tolerance[what]} == {}


def test_the_deviation_is_the_largest_of_each_kind():
    stored = {"steps": {"a": 2.0, "b": 4.0, "zero": 0.0}, "gradients": {"x": 1.0}}
    found = {"steps": {"a": 2.02, "b": 4.2, "zero": 0.0}, "gradients": {"x": 1.0}}
    assert golden.deviations(stored, stored) == {"steps": (0.0, "a"), "gradients": (0.0, "x")}
    assert golden.deviations(stored, found)["steps"] == (pytest.approx(0.05), "b")
    lost, gained, moved = {"steps": stored["steps"]}, {**stored, "new": {"y": 1.0}}, {**stored, "gradients": {"z": 1.0}}
    assert golden.deviations(stored, lost)["gradients"] == (np.inf, "x")
    assert golden.deviations(stored, gained)["new"] == (np.inf, "y")
    assert golden.deviations(stored, moved)["gradients"][0] == np.inf
    assert golden.deviations(stored, {**stored, "gradients": {"x": np.nan}})["gradients"] == (np.inf, "x")


def test_a_gradient_that_cancels_is_held_to_the_size_of_the_others():
    stored, found = ({what: {"x": 100.0, "y": y} for what in ("gradients", "steps")} for y in (0.1, 0.11))
    gaps = golden.deviations(stored, found)
    assert gaps == {"gradients": (pytest.approx(0.01), "y"), "steps": (pytest.approx(0.1), "y")}


def report(store: Path, **items):
    """As the probe writes it, of one case."""
    stored = {
        what.replace("_", " "): {path: bits_probe.stored(np.asarray(x), store) for path, x in arrays.items()}
        for what, arrays in items.items()
    }
    return {"device": "cpu", "cases": [{"preset": "demo", "dtype": "float32", "variant": "scanned", "items": stored}]}


def test_equal_bits_are_the_same(tmp_path):
    x = np.array([0.0, -0.0, np.nan, 1.0], np.float32)
    reports = [report(tmp_path, loss={"": np.float32(1)}, gradients={"a": x}) for _ in range(2)]
    (row,) = same_bits.compare(*reports, tmp_path)
    assert row.compared == ("loss", "gradients") and row.differences == ()
    table = same_bits.format_report([row]).splitlines()
    assert [line.split() for line in table] == [
        ["preset", "dtype", "variant", "loss", "gradients"],
        ["demo", "float32", "scanned", "same", "same"],
    ]


def test_the_first_and_the_largest_difference_are_named(tmp_path):
    ones = np.ones((2, 3), np.float32)
    changed, far = ones.copy(), ones.astype(jnp.bfloat16)
    changed[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    far[0] = 3
    base = report(tmp_path, loss={"": np.float32(1)}, gradients={"a": ones, "b": ones.astype(jnp.bfloat16)})
    tree = report(tmp_path, loss={"": np.float32(1)}, gradients={"a": changed, "b": far})
    (row,) = same_bits.compare(base, tree, tmp_path)
    header, line, first, largest = same_bits.format_report([row]).splitlines()
    assert header.split()[-2:] == ["loss", "gradients"] and line.split()[-2:] == ["same", "DIFFERENT"]
    assert "first gradients, a: 1 of 6 numbers, at most by 1.2e-07 (1.0 and 1.0000001192092896)" in first
    assert "largest gradients, b: 3 of 6 numbers, at most by 2 (1.0 and 3.0)" in largest


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.ones(2, np.float32), "c": np.ones(1)}, "gradients, c: only in the working tree"),
        ({}, "gradients, a: only in the base"),
        ({"a": np.ones((1, 2), np.float32)}, "gradients, a: float32[2] and float32[1, 2]"),
        ({"a": np.ones(2, jnp.bfloat16)}, "gradients, a: float32[2] and bfloat16[2]"),
        ({"a": np.array([1, np.nan], np.float32)}, "gradients, a: 1 of 2 numbers, at most by inf (1.0 and nan)"),
    ],
)
def test_arrays_that_cannot_be_subtracted_differ(tmp_path, arrays, said):
    reports = [report(tmp_path, gradients=x) for x in ({"a": np.ones(2, np.float32)}, arrays)]
    (row,) = same_bits.compare(*reports, tmp_path)
    assert same_bits.format_report([row]).endswith(f"demo float32 scanned: first {said}")


def test_zeros_of_either_sign_are_other_bits(tmp_path):
    reports = [report(tmp_path, steps={"loss": np.float32(x)}) for x in (0.0, -0.0)]
    (row,) = same_bits.compare(*reports, tmp_path)
    assert [d.text for d in row.differences] == ["1 of 1 numbers, at most by 0 (0.0 and -0.0)"]


PROBE = """
    import argparse, json, pathlib
    parser = argparse.ArgumentParser()
    parser.add_argument("presets", nargs="+")
    for option in ("--store", "--report", "--devices"):
        parser.add_argument(option)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    pathlib.Path(args.store, "LOSS").write_bytes(b"LOSS")
    items = {"steps": {"0 loss": {"dtype": "float32", "shape": [], "sha256": "LOSS"}}}
    cases = [{"preset": args.presets[0], "dtype": "float32", "variant": "as it is", "items": items}]
    pathlib.Path(args.report).write_text(json.dumps({"device": "cpu", "cases": cases}))
"""


def tree(path: Path, loss: str) -> Path:
    """A checkout whose own probe reports `loss`, four letters that stand for the bytes of a number."""
    for folder in ("senano_jax", "scripts"):
        (path / folder).mkdir(parents=True)
    (path / "senano_jax" / "presets.py").touch()
    (path / same_bits.PROBE).write_text(textwrap.dedent(PROBE).replace("LOSS", loss))
    return path


@pytest.mark.parametrize(
    ("loss", "status", "verdict"), [("aaaa", 0, "the same bits"), ("aaab", 1, "1 of 1 cases DIFF")]
)
def test_each_tree_is_measured_by_its_own_probe(tmp_path, monkeypatch, capsys, loss, status, verdict):
    monkeypatch.setattr(same_bits, "ROOT", tree(tmp_path / "tree", loss))
    with pytest.raises(SystemExit) as ended:
        same_bits.main([str(tree(tmp_path / "base", "aaaa")), "--preset", "demo", "--twice"])
    assert ended.value.code == status
    assert verdict in capsys.readouterr().out.splitlines()[-1]


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    base = tree(tmp_path / "base", "aaaa")
    monkeypatch.setattr(same_bits, "ROOT", tree(tmp_path / "tree", "aaaa"))
    (base / same_bits.PROBE).write_text("raise SystemExit(3)")
    for given, said in ((str(base), "failed with status 3"), ("no-such-revision", "BASE no-such-revision is neither")):
        with pytest.raises(SystemExit) as ended:
            same_bits.main([given, "--preset", "demo"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="no preset in common"):
        same_bits.compare({"cases": []}, report(tmp_path, loss={"": np.float32(1)}), tmp_path)


def test_names_are_found_where_they_are_or_were():
    assert bits_probe.from_first("loads", "json.not_there", "json") is json.loads
    assert bits_probe.from_first("loads", "math", "json") is json.loads
    with pytest.raises(ImportError, match=r"loads is in none of math, no\.where"):
        bits_probe.from_first("loads", "math", "no.where")
