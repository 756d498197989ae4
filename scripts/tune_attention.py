"""Sweep of tile sizes, warps and pipeline stages for the three flash kernels; the winners belong in attention/tiles.py.

    python scripts/tune_attention.py --shard fineweb_val_000000.bin --out tiles.tsv

All configurations compile first, in parallel, then each runs alone at every window (which is a traced number: one
compilation serves all). A configuration that fails (registers, shared memory) is a line of the table, not the end.
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import time

import jax
import jax.numpy as jnp
from bench_attention import chain, load_tokens, median_ms

from senano_jax.attention import flash
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


KERNELS = {"forward": run_forward, "dq": run_dq, "dkv": run_dkv}


def candidates(args):
    """(kernel, tile) to try: those named, or the product of the sizes less what cannot be good."""
    if args.only:
        for name in args.only:
            kernel, numbers = name.split(":")
            yield kernel, Tile(*map(int, numbers.split("x")))
        return
    for kernel, *numbers in itertools.product(args.kernels, args.queries, args.keys, args.warps, args.stages):
        tile = Tile(*numbers)
        rows = tile.keys if kernel == "dkv" else tile.queries
        if rows >= 16 * tile.warps:  # the tensor cores give a warp 16 rows: more warps would repeat work
            yield kernel, tile


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", help="a .bin shard for real documents; default: synthetic lengths")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 7, 14])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--queries", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--keys", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", metavar="KERNEL:QxKxWxS", help="these, not the product of the above")
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
        for kernel in KERNELS:
            arguments[kernel][window] = backward[:4] if kernel == "forward" else backward

    rows = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = []
        for kernel, tile in candidates(args):
            lowered = jax.jit(chain(functools.partial(KERNELS[kernel], tile), args.calls)).lower(
                *arguments[kernel][args.windows[0]]
            )
            compiling.append((kernel, tile, pool.submit(lowered.compile)))
        for kernel, tile, future in compiling:
            try:
                compiled = future.result(timeout=max(0, deadline - time.monotonic()))
                milliseconds = [
                    median_ms(compiled, arguments[kernel][window], args.calls, args.repetitions)
                    for window in args.windows
                ]
            except Exception as error:
                rows.append((kernel, tile, None, f"{type(error).__name__} {str(error)[:80]!r}"))
                continue
            rows.append((kernel, tile, milliseconds, ""))

    lines = ["\t".join(["kernel", "queries", "keys", "warps", "stages", *[f"ms W={w}" for w in args.windows], ""])]
    for kernel, tile, milliseconds, error in rows:
        times = [f"{ms:.4f}" for ms in milliseconds] if milliseconds else ["-"] * len(args.windows)
        lines.append("\t".join(map(str, [kernel, tile.queries, tile.keys, tile.warps, tile.stages, *times, error])))
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
