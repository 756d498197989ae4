"""The numbers that tests/test_golden.py holds every revision to: what small versions of the presets compute.

    python scripts/golden_numbers.py                       # how far this machine and this revision are from them
    python scripts/golden_numbers.py --write               # after a change that was meant to change results

The same runs as in same_bits.py, as a few numbers that all processors agree on, up to rounding: the validation loss,
the norm of every weight at the start and of its gradient in the first step, losses and gradient norms of three steps.
Write them anew only if a result was to change, in the commit that changes it, and say there why.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bits_probe import SYSTEMS, Case, Measured, cases, measure

from senano_jax.errors import one_line_errors
from senano_jax.files import write_atomically

FILE = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden.json"

Numbers = Mapping[str, Mapping[str, float]]  # by what they are, then by name


def golden_cases() -> dict[str, Case]:
    """Every system in float32, and one in bfloat16, by name."""
    every = [case for name in SYSTEMS for case in cases(name, full=False, devices=1)]
    first = {f"{case.preset} {case.dtype}": case for case in reversed(every)}
    return {name: first[name] for name in sorted(first) if name.endswith("float32") or name == "recurrent bfloat16"}


def numbers_of(measured: Measured) -> Numbers:
    def norms(arrays):
        return {path: float(np.linalg.norm(x.astype(np.float64))) for path, x in arrays.items()}

    def numbers(arrays):
        return {path: float(x) for path, x in arrays.items()}

    steps = numbers(measured["steps"])
    return {
        "initial weights": norms(measured["initial weights"]),
        "validation": numbers(measured["validation"]),
        "gradients": norms(measured["gradients"]),
        "losses": {name: x for name, x in steps.items() if name.endswith("loss")},
        "gradient norms": {name: x for name, x in steps.items() if not name.endswith("loss")},
    }


def deviations(stored: Numbers, found: Numbers) -> dict[str, tuple[float, str]]:
    """For each kind of number the largest relative difference, and which number's it is; infinite where one is missing.

    A gradient far below the others is what is left of terms that cancel, and has their rounding: differences of
    gradients are relative to 1% of the largest one at least.
    """
    worst = {}
    for what in {**stored, **found}:
        expected, given = stored.get(what, {}), found.get(what, {})
        least = 0.01 * max(expected.values(), default=0) if what == "gradients" else 0
        gaps = {name: _gap(expected.get(name), given.get(name), least) for name in {**expected, **given}}
        name = max(gaps, key=gaps.get)
        worst[what] = (gaps[name], name)
    return worst


def _gap(expected: float | None, given: float | None, least: float) -> float:
    if expected == given:
        return 0.0
    scale = max(abs(expected or 0), least)
    if expected is None or given is None or not scale or math.isnan(given):
        return math.inf
    return abs(given - expected) / scale


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/data/golden.json")
    args = parser.parse_args(argv)
    found = {}
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, case in golden_cases().items():
        found[name] = numbers_of(measure(case))
        for what, (gap, where) in deviations(stored.get(name, {}), found[name]).items():
            print(f"{name}, {what}: {gap:.1e} ({where})", flush=True)
    if args.write:
        write_atomically(FILE, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
