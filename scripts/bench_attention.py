"""Attention speed on one GPU: our kernels, the banded XLA version, and cuDNN's token window as a ceiling.

    python scripts/bench_attention.py --shard fineweb_val_000000.bin --out attention.json
    python scripts/bench_attention.py --length 16384 --implementations heads-stored heads

`heads` is hopper with what comes before it in a layer: its queries, keys and values are made of a product and of the
first layer's values, and the gradients are those of the product's operands and of these. `heads-stored` is the same
with the product and the gradients of queries, keys and values in memory, for kernels of their own.

cuDNN knows neither documents nor block windows: it computes causal attention over the last 128*W tokens, another
model. It is here as the speed of a well-made kernel that has no borders to look at.

Time is the median over repetitions of a jitted chain of calls, divided by its length, so that launch overhead is spread
thin; a chain's calls cannot overlap. FLOPs count the 64x64 tiles with at least one visible pair of query and key (of
cuDNN's own window for cuDNN), 4*D a pair forward and 14*D forward and backward, so that recomputation counts nothing.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from senano_jax.attention.banded import banded_attention
from senano_jax.attention.flash import flash_attention
from senano_jax.attention.hopper_flash import hopper_attention
from senano_jax.attention.intervals import BLOCK, END_OF_TEXT, document_start, window_intervals
from senano_jax.data.shards import open_shard
from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax
from senano_jax.model.heads import prepare_heads
from senano_jax.model.heads_attention import attend_product
from senano_jax.model.rotary import rotary_tables

KERNELS = {"hopper": hopper_attention, "flash": flash_attention, "banded": banded_attention}
OF_PRODUCT = ("heads", "heads-stored")
COUNTED_TILE = 64  # rows and columns of the tiles whose FLOPs are counted
FORWARD, FORWARD_AND_BACKWARD = 4, 14  # FLOPs of a counted pair, for each number of a head's width
MEAN_DOCUMENT = 720  # tokens, FineWeb's mean; the spread below is FineWeb's too
DOCUMENT_SIGMA = 1.2


def load_tokens(shard: str | None, batch: int, length: int) -> np.ndarray:
    """int32 [batch, length]: the head of a shard, or documents of log-normal length."""
    if shard is not None:
        return np.asarray(open_shard(expand_home(shard))[: batch * length], np.int32).reshape(batch, length)
    rng = np.random.default_rng(0)
    mu = np.log(MEAN_DOCUMENT) - DOCUMENT_SIGMA**2 / 2
    lengths = np.maximum(1, rng.lognormal(mu, DOCUMENT_SIGMA, batch * length)).astype(int)
    tokens = np.zeros(batch * length, np.int32)
    starts = np.cumsum(lengths)
    tokens[starts[starts < tokens.size]] = END_OF_TEXT
    return tokens.reshape(batch, length)


def counted_pairs(key_start_BT: np.ndarray, tile: int = COUNTED_TILE) -> int:
    """Pairs of query and key in the tiles that hold at least one visible pair."""
    first_tile = key_start_BT[:, ::tile] // tile  # key_start is sorted: a tile's first query sees furthest back
    own_tile = np.arange(first_tile.shape[1])
    return int((own_tile - first_tile + 1).sum()) * tile * tile


def tflops(flops: int, ms: float, args, pairs: int) -> float:
    """TFLOP/s of what runs `ms`; `flops` is FORWARD or FORWARD_AND_BACKWARD."""
    return flops * args.width * args.heads * pairs / ms / 1e9


def chain(function, calls: int):
    """A jitted function that runs `function` on its arguments `calls` times, one after the other."""

    def run(*arguments):
        results = []
        for _ in range(calls):
            results.append(function(*arguments))
            # The same arguments, but the compiler must believe that they depend on the last result.
            arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
        return results

    return run


def median_ms(compiled, arguments, calls: int, repetitions: int) -> float:
    """Milliseconds of one call in a compiled chain."""
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def cudnn_window(q, k, v, intervals, scale, window_blocks):
    del intervals
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=(BLOCK * window_blocks - 1, 0),
        implementation="cudnn",
    )


def of_product(x, w, first_v, value_residual, intervals, scale, *, stored: bool):
    """Attention's output for the product x w, [B, T, 3*H*D], half of whose values are those of `first_v`."""
    _, length, heads, width = first_v.shape
    others = (first_v, value_residual, rotary_tables(length, width))
    if stored:
        return hopper_attention(*prepare_heads(x @ w, *others, heads), intervals, scale)
    return attend_product(x, w, *others, intervals, heads, scale, "hopper")[0]


def forward_and_backward(attention):
    def run(*arguments):
        *inputs, intervals, dout = arguments
        out, pullback = jax.vjp(lambda *inputs: attention(*inputs, intervals), *inputs)
        return out, pullback(dout)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", help="a .bin shard for real documents; default: synthetic lengths")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 7, 14], help="blocks of 128 tokens")
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=["hopper", "flash", "cudnn", "banded"],
        choices=[*KERNELS, "cudnn", *OF_PRODUCT],
    )
    parser.add_argument("--calls", type=int, default=8, help="length of a chain")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=expand_home, help="a JSON file for the table")
    args = parser.parse_args()
    start_jax()

    scale = 0.12
    tokens = jnp.asarray(load_tokens(args.shard, args.batch, args.length))
    shape = (args.batch, args.length, args.heads, args.width)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    x, dim = q.reshape(*shape[:2], -1), args.heads * args.width
    w = jax.random.normal(jax.random.key(1), (dim, 3 * dim), jnp.bfloat16) / dim**0.5
    kernels = KERNELS | {name: functools.partial(of_product, stored=name == "heads-stored") for name in OF_PRODUCT}
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, B T H D = {shape}, documents: {args.shard or 'synthetic'}")
    print(f"{'implementation':>14} {'W':>3} {'fwd ms':>8} {'f+b ms':>8} {'fwd TFLOP/s':>12} {'f+b TFLOP/s':>12}")
    rows = []
    for implementation in args.implementations:
        for window in args.windows:
            starts = document_start(tokens)
            if implementation == "cudnn":
                position = np.broadcast_to(np.arange(args.length), tokens.shape)
                pairs = counted_pairs(np.maximum(position - BLOCK * window + 1, 0))
                attention = functools.partial(cudnn_window, scale=scale, window_blocks=window)
            else:
                pairs = counted_pairs(np.asarray(window_intervals(starts, window).key_start))
                attention = functools.partial(_with_scale, kernels[implementation], scale)
            intervals = jax.jit(window_intervals)(starts, window)
            inputs = (x, w, v, jnp.float32(0.5)) if implementation in OF_PRODUCT else (q, k, v)
            try:
                milliseconds = [
                    _measure(attention, (*inputs, intervals), args),
                    _measure(forward_and_backward(attention), (*inputs, intervals, dout), args),
                ]
            except Exception as error:  # out of memory, no cuDNN, no Hopper: the other rows still count
                print(f"{implementation:>14} {window:>3} failed: {str(error).splitlines()[0][:120]}")
                continue
            if implementation in OF_PRODUCT:
                rates = [None, None]  # products take a part of the time
            else:
                rates = [tflops(*each, args, pairs) for each in zip((FORWARD, FORWARD_AND_BACKWARD), milliseconds)]
            rows.append(
                {
                    "implementation": implementation,
                    "window_blocks": window,
                    "forward_ms": milliseconds[0],
                    "forward_backward_ms": milliseconds[1],
                    "forward_tflops": rates[0],
                    "forward_backward_tflops": rates[1],
                }
            )
            shown = "".join(f" {'-' if rate is None else f'{rate:.0f}':>12}" for rate in rates)
            print(f"{implementation:>14} {window:>3} {milliseconds[0]:8.3f} {milliseconds[1]:8.3f}{shown}", flush=True)
    if args.out:
        head = {
            "device": device,
            "jax": jax.__version__,
            "shape": shape,
            "documents": args.shard or "synthetic",
            "counted_tile": COUNTED_TILE,
        }
        args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def _with_scale(kernel, scale, *arguments):
    return kernel(*arguments, scale)


def _measure(function, arguments, args) -> float:
    compiled = jax.jit(chain(function, args.calls)).lower(*arguments).compile()
    return median_ms(compiled, arguments, args.calls, args.repetitions)


if __name__ == "__main__":
    with one_line_errors():
        main()
