"""Does the working tree compute the same bits as another revision? For changes that must not change a result.

    python scripts/same_bits.py BASE
    python scripts/same_bits.py BASE --full --twice        # on a GPU: the record system at its full width

BASE is a revision of the repository, or the path of a checkout. Small versions of the record's systems and the demo, in
float32 and bfloat16: initial weights, validation loss, the gradients of a step, and what three training steps report
and leave. Bits depend on the processor and on XLA, so both trees are measured here and now, one after the other, each
by its own copy of bits_probe.py; a base without one is measured by ours. Both share one cache of compiled programs, so
what is the same program is compiled once and is the same. Change neither tree meanwhile.

Ends with status 1 if a bit differs, and says where first and by how much.
"""

import argparse
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from bits_probe import SYSTEMS

from senano_jax.errors import UserError, check_counts, one_line_errors
from senano_jax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PROBE = "scripts/bits_probe.py"

# Sums in one order, kernels not chosen by their time, every rounding where the program has it.
FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0 --xla_allow_excess_precision=false"
TINY_FLAGS = "--xla_backend_optimization_level=1"  # half the time to compile; both trees alike
TINY_PROCESSES = 2  # at a time: a process mostly traces and compiles, on one core
KEYS = ("preset", "dtype", "variant")  # of a case

Report = Mapping[str, Any]  # what bits_probe.py writes


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two arrays of one name."""

    what: str
    path: str
    text: str
    largest: float  # absolute difference of two numbers; infinite where they cannot be compared


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, in both trees."""

    case: tuple[str, str, str]  # preset, dtype, variant
    compared: tuple[str, ...]  # what was
    differences: tuple[Difference, ...]  # in the order of computation


def compare(base: Report, tree: Report, store: Path) -> list[Row]:
    """The cases that both reports have; `store` holds the bytes of their arrays. Raises UserError if there are none."""
    measured = [
        {tuple(case[key] for key in KEYS): case["items"] for case in report["cases"]} for report in (base, tree)
    ]
    rows = []
    for case in (case for case in measured[0] if case in measured[1]):
        items = [of[case] for of in measured]
        compared = tuple(dict.fromkeys([*items[0], *items[1]]))
        found = [d for what in compared for d in differences(what, *(of.get(what, {}) for of in items), store)]
        rows.append(Row(case, compared, tuple(found)))
    if not rows:
        raise UserError("the two trees have no preset in common; give --preset one that both have")
    return rows


def differences(what: str, base: Mapping, tree: Mapping, store: Path) -> Iterator[Difference]:
    for path in sorted({*base, *tree}):
        if path not in base or path not in tree:
            only = "the base" if path in base else "the working tree"
            yield Difference(what, path, f"only in {only}", np.inf)
        elif base[path] != tree[path]:
            yield difference(what, path, base[path], tree[path], store)


def difference(what: str, path: str, base: Mapping, tree: Mapping, store: Path) -> Difference:
    kinds = [f"{array['dtype']}{array['shape']}" for array in (base, tree)]
    if kinds[0] != kinds[1]:
        return Difference(what, path, f"{kinds[0]} and {kinds[1]}", np.inf)
    a, b = (_load(array, store) for array in (base, tree))
    raw = [x.view(f"u{x.itemsize}") for x in (a, b)]
    count = int(np.count_nonzero(raw[0] != raw[1]))
    gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
    gaps = np.where(np.isnan(gaps) & (raw[0] != raw[1]), np.inf, gaps)
    at = np.unravel_index(np.nanargmax(gaps), gaps.shape)
    values = f"{float(a[at])!r} and {float(b[at])!r}"
    text = f"{count:,} of {a.size:,} numbers, at most by {gaps[at]:.2g} ({values})"
    return Difference(what, path, text, float(gaps[at]))


def _load(array: Mapping, store: Path) -> np.ndarray:
    return np.frombuffer((store / array["sha256"]).read_bytes(), jnp.dtype(array["dtype"])).reshape(array["shape"])


def format_report(rows: Sequence[Row]) -> str:
    """A line for each case and a column for each thing compared; below, what differs first and what most."""
    columns = tuple(dict.fromkeys(what for row in rows for what in row.compared))
    table = [(*KEYS, *columns)]
    for row in rows:
        different = {d.what for d in row.differences}
        cells = ("DIFFERENT" if what in different else "same" if what in row.compared else "-" for what in columns)
        table.append((*row.case, *cells))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    for row in rows:
        if row.differences:
            first, largest = row.differences[0], max(row.differences, key=lambda d: d.largest)
            lines.append(f"{' '.join(row.case)}: first {_told(first)}")
            if largest is not first:
                lines.append(f"{' ' * len(' '.join(row.case))}  largest {_told(largest)}")
    return "\n".join(lines)


def _told(found: Difference) -> str:
    return f"{found.what}, {found.path}: {found.text}"


def measure(tree: Path, name: str, args: argparse.Namespace, folder: Path, cache: str = "cache") -> Report:
    """Runs the probe of `tree`, or ours, on its package, one process a preset. Raises UserError if one fails."""
    probe = tree / PROBE if (tree / PROBE).exists() else ROOT / PROBE
    print(f"{name}: {tree}{'' if probe.is_relative_to(tree) else ' (which has no probe of its own)'}", file=sys.stderr)
    flags = FLAGS if args.full else f"{FLAGS} {TINY_FLAGS}"
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "XLA_FLAGS": f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(folder / cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    started: list[subprocess.Popen] = []

    def measured(preset: str) -> Report:
        file = folder / f"{preset}.json"
        options = ["--store", folder, "--report", file, "--devices", str(args.devices), *["--full"] * args.full]
        process = subprocess.Popen([sys.executable, probe, *options, preset], env=environment, cwd=folder)
        started.append(process)
        if status := process.wait():
            raise UserError(f"{name}: {probe} failed with status {status} on the package in {tree}; see above")
        return json.loads(file.read_text())

    with ThreadPoolExecutor(1 if args.full else TINY_PROCESSES) as pool:
        try:
            reports = list(pool.map(measured, args.preset))
        finally:
            for process in started:
                process.terminate()
    return {"device": reports[0]["device"], "cases": [case for report in reports for case in report["cases"]]}


def checked_out(revision: str, folder: Path) -> Path:
    """The files of a revision, in `folder`; or the checkout that `revision` is the path of. Raises UserError if it is
    neither."""
    if (Path(revision) / "senano_jax" / "presets.py").is_file():
        return Path(revision).resolve()
    try:
        archive = subprocess.run(["git", "archive", "--", revision], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise UserError(
            f"BASE {revision} is neither a checkout of this project nor a revision ({reason.splitlines()[0]}); "
            "give one of both"
        ) from None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder / "base", filter="data")
    return folder / "base"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="revision, or path of a checkout")
    parser.add_argument(
        "--preset",
        action="append",
        choices=PRESETS,
        help="may be repeated; default: the record systems and demo, with --full recurrent",
    )
    parser.add_argument("--full", action="store_true", help="at full width, three steps: needs a GPU")
    parser.add_argument("--devices", type=int, default=1, help="that a step is spread over; 1 or 2 of a CPU")
    parser.add_argument("--twice", action="store_true", help="first measure the base twice, compiled anew")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else hundreds of megabytes stay in the temporary folder
    args.preset = args.preset or (["recurrent"] if args.full else list(SYSTEMS))
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        check_counts({"--devices": args.devices}, 1)
        if args.devices > 2 and not args.full:
            raise UserError(f"--devices {args.devices}: the small runs are spread over 1 or 2")
        folder = Path(temporary)
        base_tree = checked_out(args.base, folder)
        base = measure(base_tree, "base", args, folder)
        if args.twice:
            again = compare(base, measure(base_tree, "base again", args, folder, cache="second-cache"), folder)
            if any(row.differences for row in again):
                print(format_report(again))
                raise UserError(f"{args.base} does not repeat its own bits here, so none can be compared")
        rows = compare(base, measure(ROOT, "working tree", args, folder), folder)
    print(format_report(rows))
    for name in (name for name in args.preset if name not in {row.case[0] for row in rows}):
        print(f"{name}: not compared, the base does not have it")
    different = sum(bool(row.differences) for row in rows)
    print(f"{base['device']}: {f'{different} of {len(rows)} cases DIFFERENT' if different else 'the same bits'}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
