"""Speed of `prepare_heads` on one GPU: XLA's kernels, and the fused ones at several launches.

    python scripts/bench_heads.py

Time is the median over repetitions of a jitted chain of calls, divided by its length; backward is the difference of
forward and backward together and forward alone. Bytes count each tensor once: forward reads qkv, first_v and the rotary
tables and writes q, k and v; backward reads these inputs and three gradients and writes those of qkv and of first_v
(the latter by XLA, in a pass of its own here; in the model together with those of all layers). The ratio is that of the
plain version's time, forward and backward, to this one's.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from bench_attention import chain, median_ms

from senano_jax.errors import one_line_errors
from senano_jax.jax_settings import start_jax
from senano_jax.kernels.triton import HeadLaunch, HeadLaunches
from senano_jax.model.heads import prepare_heads
from senano_jax.model.rotary import rotary_tables

LAUNCHES = ("16,6,4", "16,3,4", "16,1,4", "8,6,2", "8,2,2", "8,1,2", "32,6,8", "32,1,4")
PASSES = ("fwd", "bwd", "f+b")


def forward_and_backward(prepare):
    def run(qkv, first_v, value_residual, rotary, gradients):
        out, pullback = jax.vjp(lambda *inputs: prepare(*inputs, rotary), qkv, first_v, value_residual)
        return out, pullback(gradients)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--launches", nargs="*", default=LAUNCHES, metavar="TOKENS,HEADS,WARPS")
    parser.add_argument("--calls", type=int, default=16, help="length of a chain; all its outputs are kept")
    parser.add_argument("--repetitions", type=int, default=20)
    args = parser.parse_args()
    start_jax()

    shape = (args.batch, args.length, args.heads, args.width)
    keys = jax.random.split(jax.random.key(0), 5)
    qkv = jax.random.normal(keys[0], (*shape[:2], 3 * args.heads * args.width), jnp.bfloat16)
    first_v, *gradients = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
    rotary = jax.jit(rotary_tables, static_argnums=(0, 1))(args.length, args.width)
    inputs = (qkv, first_v, jnp.float32(0.5), rotary)
    megabytes = [(parts * first_v.nbytes + 2 * rotary[0].nbytes) / 1e6 for parts in (7, 11)]

    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, B T H K = {shape}, bfloat16")
    print(f"counted MB: {megabytes[0]:.0f} forward, {megabytes[1]:.0f} backward; launches are tokens,heads,warps")
    columns = [*(f"{name + ' us':>8}" for name in PASSES), *(f"{name + ' GB/s':>9}" for name in PASSES), " ratio"]
    print(" " * 12, *columns)
    plain_us = None
    for name in ("plain", *args.launches):
        try:
            prepare = functools.partial(prepare_heads, num_heads=args.heads, **_options(name))
            forward_us = _measure(prepare, inputs, args)
            both_us = _measure(forward_and_backward(prepare), (*inputs, tuple(gradients)), args)
        except Exception as error:  # too many registers, no memory: the other rows still count
            print(f"{name:>12} failed: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        plain_us = plain_us or both_us
        times = (forward_us, both_us - forward_us, both_us)
        speeds = [1e3 * mb / us for mb, us in zip((*megabytes, sum(megabytes)), times)]
        numbers = [
            *(f"{us:8.1f}" for us in times),
            *(f"{speed:9.0f}" for speed in speeds),
            f"{plain_us / both_us:6.2f}",
        ]
        print(f"{name:>12}", *numbers, flush=True)


def _options(name: str) -> dict:
    if name == "plain":
        return {"implementation": "plain"}
    tokens, heads, warps = map(int, name.split(","))
    launch = HeadLaunch(tokens, heads, warps)
    return {"implementation": "fused", "launches": HeadLaunches(launch, launch)}


def _measure(function, arguments, args) -> float:
    """Microseconds of one call."""
    compiled = jax.jit(chain(function, args.calls)).lower(*arguments).compile()
    return 1e3 * median_ms(compiled, arguments, args.calls, args.repetitions)


if __name__ == "__main__":
    with one_line_errors():
        main()
