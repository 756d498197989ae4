"""Sweep of tile sizes for the three kernels of attention; the winners belong in attention/tiles.py or hopper_tiles.py.

    python scripts/tune_attention.py --shard fineweb_val_000000.bin --out tiles.tsv
    python scripts/tune_attention.py --implementation hopper --only forward:3 dkv:2

The sizes of a configuration are QUERIESxKEYSxWARPSxSTAGES for flash, STAGES for hopper.

All configurations compile first, in parallel, then each runs alone at every window (which is a traced number: one
compilation serves all), the defaults before the others. A configuration that fails (registers, shared memory) is a line
of the table, not the end.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import FORWARD_AND_BACKWARD, chain, counted_pairs, load_tokens, median_ms, tflops

from senano_jax.attention import flash, hopper_backward_keys, hopper_backward_queries, hopper_forward
from senano_jax.attention.hopper_tiles import DEFAULT_STAGES, Stages
from senano_jax.attention.intervals import document_start, window_intervals
from senano_jax.attention.tiles import BFLOAT16, Tile
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax

SCALE = 0.12


def run_forward(sizes, q, k, v, intervals):
    return flash.forward(q, k, v, intervals.key_start, SCALE, Tile(*sizes), False)


def run_dq(sizes, q, k, v, intervals, out, dout, lse, delta):
    del delta
    return flash.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, Tile(*sizes), False)


def run_dkv(sizes, q, k, v, intervals, out, dout, lse, delta):
    del out
    return flash.backward_keys(q, k, v, dout, lse, delta, intervals.query_end, SCALE, Tile(*sizes), False)


def run_hopper_forward(sizes, q, k, v, intervals):
    return hopper_forward.forward(q, k, v, intervals.key_start, SCALE, Stages(forward=sizes[0]).forward)


def run_hopper_dq(sizes, q, k, v, intervals, out, dout, lse, delta):
    del delta
    stages = Stages(dq=sizes[0]).dq
    return hopper_backward_queries.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, stages)


def run_hopper_dkv(sizes, q, k, v, intervals, out, dout, lse, delta):
    del out
    stages = Stages(dkv=sizes[0]).dkv
    return hopper_backward_keys.backward_keys(q, k, v, dout, lse, delta, intervals.query_end, SCALE, stages)


KERNELS = {
    "flash": {"forward": run_forward, "dq": run_dq, "dkv": run_dkv},
    "hopper": {"forward": run_hopper_forward, "dq": run_hopper_dq, "dkv": run_hopper_dkv},
}
SIZES = {"flash": [field.name for field in dataclasses.fields(Tile)], "hopper": ["stages"]}
DEFAULTS = {
    "flash": {kernel: dataclasses.astuple(getattr(BFLOAT16, kernel)) for kernel in KERNELS["flash"]},
    "hopper": {kernel: (getattr(DEFAULT_STAGES, kernel),) for kernel in KERNELS["hopper"]},
}


class Row(NamedTuple):
    """What came of one configuration."""

    kernel: str
    sizes: tuple[int, ...]
    milliseconds: list[float] | None = None  # for each window
    error: str = ""

    @classmethod
    def failed(cls, kernel, sizes, error: Exception) -> "Row":
        return cls(kernel, sizes, error=f"{type(error).__name__} {str(error)[:80]!r}")

    def __str__(self):
        times = [f"{ms:.4f}" for ms in self.milliseconds] if self.milliseconds else [self.error]
        return " ".join([self.kernel, "x".join(map(str, self.sizes)), *times])


def candidates(args) -> list[tuple[str, tuple[int, ...]]]:
    """(kernel, sizes) to try: the defaults, then those named, or the product of the sizes less what cannot be good."""
    found = [(kernel, DEFAULTS[args.implementation][kernel]) for kernel in args.kernels]
    if args.only:
        found += [parse(name, SIZES[args.implementation]) for name in args.only]
    elif args.implementation == "hopper":
        found += [(kernel, (stages,)) for kernel, stages in itertools.product(args.kernels, args.stages)]
    else:
        for kernel, *sizes in itertools.product(args.kernels, args.queries, args.keys, args.warps, args.stages):
            queries, keys, warps, _ = sizes
            rows = keys if kernel == "dkv" else queries
            if rows >= 16 * warps:  # the tensor cores give a warp 16 rows: more warps would repeat work
                found.append((kernel, tuple(sizes)))
    return list(dict.fromkeys(found))


def parse(name: str, sizes: list[str]) -> tuple[str, tuple[int, ...]]:
    """forward:64x64x4x3 -> ("forward", (64, 64, 4, 3))."""
    kernel, _, numbers = name.partition(":")
    if kernel not in KERNELS["flash"] or not re.fullmatch("x".join([r"\d+"] * len(sizes)), numbers):
        raise UserError(
            f"--only {name}: give KERNEL:{'x'.join(sizes).upper()}, KERNEL of {', '.join(KERNELS['flash'])}"
        )
    return kernel, tuple(map(int, numbers.split("x")))


def run_all(args, tried: list[tuple[str, tuple[int, ...]]], arguments: dict[str, dict[int, tuple]]) -> list[Row]:
    """The times of those tried; `arguments` are for each kernel and window."""
    deadline = time.monotonic() + 60 * args.minutes
    rows = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = []
        for kernel, sizes in tried:
            run = jax.jit(chain(functools.partial(KERNELS[args.implementation][kernel], sizes), args.calls))
            try:
                lowered = run.lower(*arguments[kernel][args.windows[0]])
            except Exception as error:  # too much shared memory
                rows.append(Row.failed(kernel, sizes, error))
                continue
            compiling.append((kernel, sizes, pool.submit(lowered.compile)))
        for kernel, sizes, future in compiling:
            try:
                compiled = future.result(timeout=max(0, deadline - time.monotonic()))
                milliseconds = [
                    median_ms(compiled, arguments[kernel][window], args.calls, args.repetitions)
                    for window in args.windows
                ]
            except Exception as error:
                rows.append(Row.failed(kernel, sizes, error))
                continue
            rows.append(Row(kernel, sizes, milliseconds))
    return rows


def table(args, rows: list[Row]) -> list[str]:
    """Tab-separated lines of all rows."""
    lines = ["\t".join(["kernel", *SIZES[args.implementation], *[f"ms W={w}" for w in args.windows], ""])]
    for kernel, sizes, milliseconds, error in rows:
        times = [f"{ms:.4f}" for ms in milliseconds] if milliseconds else ["-"] * len(args.windows)
        lines.append("\t".join(map(str, [kernel, *sizes, *times, error])))
    return lines


def verdict(args, rows: list[Row], pairs: list[int]) -> list[str]:
    """The first eight of each kernel by time, the best, and what the best do together; `pairs` are for each window."""
    by_time = sorted(rows, key=lambda row: sum(row.milliseconds or [math.inf]))
    ranked = {kernel: [row for row in by_time if row.kernel == kernel] for kernel, *_ in rows}
    best = [of_kernel[0] for of_kernel in ranked.values()]
    lines = [str(row) for of_kernel in ranked.values() for row in of_kernel[:8]] + [f"best {row}" for row in best]
    if len(best) == len(KERNELS[args.implementation]) and all(row.milliseconds for row in best):
        together = [sum(times) for times in zip(*[row.milliseconds for row in best])]
        rates = [tflops(FORWARD_AND_BACKWARD, ms, args, each) for ms, each in zip(together, pairs)]
        lines.append(" ".join(["best forward and backward, TFLOP/s:", *[f"{rate:.0f}" for rate in rates]]))
    return lines


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", help="a .bin shard for real documents; default: synthetic lengths")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 7, 14])
    parser.add_argument("--implementation", default="flash", choices=list(KERNELS))
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS["flash"]), choices=list(KERNELS["flash"]))
    parser.add_argument("--queries", type=int, nargs="+", default=[32, 64, 128], help="of a tile of flash")
    parser.add_argument("--keys", type=int, nargs="+", default=[32, 64, 128], help="of a tile of flash")
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8], help="of a program of flash")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of loads in flight")
    parser.add_argument(
        "--only", nargs="+", metavar="KERNEL:SIZES", help="these after the defaults, not the product of the above"
    )
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=4, help="no configuration starts after this")
    parser.add_argument("--out", type=expand_home, help="a tab-separated file for the whole table")
    args = parser.parse_args(argv)
    tried = candidates(args)
    start_jax()

    starts = document_start(jnp.asarray(load_tokens(args.shard, args.batch, args.length)))
    shape = (args.batch, args.length, args.heads, args.width)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    arguments, pairs = {"forward": {}, "dq": {}, "dkv": {}}, []
    for window in args.windows:
        intervals = jax.jit(window_intervals)(starts, window)
        pairs.append(counted_pairs(np.asarray(intervals.key_start)))
        out, lse = flash.forward(q, k, v, intervals.key_start, SCALE, BFLOAT16.forward, False)
        _, delta = flash.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, BFLOAT16.dq, False)
        backward = (q, k, v, intervals, out, dout, lse, delta)
        for kernel in arguments:
            arguments[kernel][window] = backward[:4] if kernel == "forward" else backward

    rows = run_all(args, tried, arguments)
    lines = table(args, rows)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join([lines[0], *verdict(args, rows, pairs)]))


if __name__ == "__main__":
    with one_line_errors():
        main()
