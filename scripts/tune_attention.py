"""Sweep of tile sizes for the three kernels of attention; the winners belong in attention/tiles.py or hopper_tiles.py.

    python scripts/tune_attention.py --shard fineweb_val_000000.bin --out tiles.tsv
    python scripts/tune_attention.py --implementation hopper --kernels forward --only forward:128x2x2x1x1

A tile's name holds the fields of its class in their order: QUERIESxKEYSxWARPSxSTAGES for flash, and
COLUMNSxSTAGESxHEADSxIN_REGISTERSxTAKE_TURNS for hopper.

All configurations compile first, in parallel, then each runs alone at every window (which is a traced number: one
compilation serves all). A configuration that fails (registers, shared memory) is a line of the table, not the end.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import time

import jax
import jax.numpy as jnp
from bench_attention import chain, load_tokens, median_ms

from senano_jax.attention import flash, hopper_backward, hopper_forward
from senano_jax.attention.hopper_tiles import HopperTile
from senano_jax.attention.intervals import document_start, window_intervals
from senano_jax.attention.tiles import BFLOAT16, Tile
from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax

SCALE = 0.12


def run_forward(tile, q, k, v, intervals):
    return flash.forward(q, k, v, intervals.key_start, SCALE, tile, False)


def run_dq(tile, q, k, v, intervals, out, dout, lse, delta):
    del delta
    return flash.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, tile, False)


def run_dkv(tile, q, k, v, intervals, out, dout, lse, delta):
    del out
    return flash.backward_keys(q, k, v, dout, lse, delta, intervals.query_end, SCALE, tile, False)


def run_hopper_forward(tile, q, k, v, intervals):
    return hopper_forward.forward(q, k, v, intervals.key_start, SCALE, tile)


def run_hopper_dq(tile, q, k, v, intervals, out, dout, lse, delta):
    del delta
    return hopper_backward.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, tile)


def run_hopper_dkv(tile, q, k, v, intervals, out, dout, lse, delta):
    del out
    return hopper_backward.backward_keys(q, k, v, dout, lse, delta, intervals.query_end, SCALE, tile)


KERNELS = {
    "flash": {"forward": run_forward, "dq": run_dq, "dkv": run_dkv},
    "hopper": {"forward": run_hopper_forward, "dq": run_hopper_dq, "dkv": run_hopper_dkv},
}
TILES = {"flash": Tile, "hopper": HopperTile}


def candidates(args):
    """(kernel, tile) to try: those named, or the product of the sizes less what cannot be good."""
    if args.only:
        for name in args.only:
            kernel, numbers = name.split(":")
            yield kernel, TILES[args.implementation](*map(int, numbers.split("x")))
    elif args.implementation == "hopper":
        yield from hopper_candidates(args)
    else:
        for kernel, *numbers in itertools.product(args.kernels, args.queries, args.keys, args.warps, args.stages):
            tile = Tile(*numbers)
            rows = tile.keys if kernel == "dkv" else tile.queries
            if rows >= 16 * tile.warps:  # the tensor cores give a warp 16 rows: more warps would repeat work
                yield kernel, tile


def hopper_candidates(args):
    for kernel in args.kernels:
        columns = sorted({64, 128} & set(args.keys)) if kernel == "forward" else [64]  # two sets of scores: no room
        in_registers = [False] if kernel == "dkv" else [False, True]
        take_turns = [False, True] if kernel == "forward" else [False]
        stages = [s for s in args.stages if s >= {"forward": 2, "dq": 3, "dkv": 1}[kernel]]
        for numbers in itertools.product(columns, stages, args.program_heads, in_registers, take_turns):
            yield kernel, HopperTile(*numbers)


def failed(kernel: str, tile, error: Exception):
    """A row of the table without times."""
    return kernel, tile, None, f"{type(error).__name__} {str(error)[:80]!r}"


def main():
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
    parser.add_argument("--keys", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8], help="of a program of flash")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--program-heads", type=int, nargs="+", default=[1, 2, 3], help="of a program of hopper")
    parser.add_argument("--only", nargs="+", metavar="KERNEL:SIZES", help="these, not the product of the above")
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=4, help="no configuration starts after this")
    parser.add_argument("--out", type=expand_home, help="a tab-separated file for the whole table")
    args = parser.parse_args()
    start_jax()
    deadline = time.monotonic() + 60 * args.minutes

    starts = document_start(jnp.asarray(load_tokens(args.shard, args.batch, args.length)))
    shape = (args.batch, args.length, args.heads, args.width)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    arguments = {"forward": {}, "dq": {}, "dkv": {}}
    for window in args.windows:
        intervals = jax.jit(window_intervals)(starts, window)
        out, lse = flash.forward(q, k, v, intervals.key_start, SCALE, BFLOAT16.forward, False)
        _, delta = flash.backward_queries(q, k, v, out, dout, lse, intervals.key_start, SCALE, BFLOAT16.dq, False)
        backward = (q, k, v, intervals, out, dout, lse, delta)
        for kernel in arguments:
            arguments[kernel][window] = backward[:4] if kernel == "forward" else backward

    rows = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = []
        for kernel, tile in candidates(args):
            run = jax.jit(chain(functools.partial(KERNELS[args.implementation][kernel], tile), args.calls))
            try:
                lowered = run.lower(*arguments[kernel][args.windows[0]])
            except Exception as error:  # too much shared memory
                rows.append(failed(kernel, tile, error))
                continue
            compiling.append((kernel, tile, pool.submit(lowered.compile)))
        for kernel, tile, future in compiling:
            try:
                compiled = future.result(timeout=max(0, deadline - time.monotonic()))
                milliseconds = [
                    median_ms(compiled, arguments[kernel][window], args.calls, args.repetitions)
                    for window in args.windows
                ]
            except Exception as error:
                rows.append(failed(kernel, tile, error))
                continue
            rows.append((kernel, tile, milliseconds, ""))

    sizes = [field.name for field in dataclasses.fields(TILES[args.implementation])]
    lines = ["\t".join(["kernel", *sizes, *[f"ms W={w}" for w in args.windows], ""])]
    for kernel, tile, milliseconds, error in rows:
        times = [f"{ms:.4f}" for ms in milliseconds] if milliseconds else ["-"] * len(args.windows)
        lines.append("\t".join(map(str, [kernel, *map(int, dataclasses.astuple(tile)), *times, error])))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    print(lines[0])
    for kernel in args.kernels:
        timed = [(ms, tile) for name, tile, ms, _ in rows if name == kernel and ms]
        for ms, tile in sorted(timed, key=lambda row: sum(row[0]))[:8]:
            print(kernel, tile, *[f"{value:.4f}" for value in ms])


if __name__ == "__main__":
    with one_line_errors():
        main()
