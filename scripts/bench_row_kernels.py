"""Speed of the kernels between the matrix products on one GPU: XLA's own, and the fused ones at several launches.

    python scripts/bench_row_kernels.py                       # all of them
    python scripts/bench_row_kernels.py stream-mlp --launches 4,4 2,2 1,1
    python scripts/bench_row_kernels.py loss --launches 4,4 hopper,12
    python scripts/bench_row_kernels.py heads-product --batch 4 --launches 128,128,5,8,a,128

`heads` is prepare_heads, `offset-heads` the same with key offsets, `offset-keys` the offset of keys by itself, forward
alone; `heads-product` is the product and prepare_heads, with what the backward pass needs, forward alone: two kernels,
or the one for Hopper GPUs. `gated-exclusive` is what attention gives with both pieces; `stream-mlp` the weighted stream
beside an MLP, of which the backward pass alone is fused: the MLP is left out. `stream-mix` is the stream with a skip
connection and its norm, backward alone, too. `depth` is attention over depth, of five blocks of eight and of a sixth
that is not complete. `loss` is log-sum-exp and gradient of 8,192 tokens, `logsumexp` that sum and the product before
it, forward alone, whatever the flags for sizes say.

Time is the median over repetitions of a jitted chain of calls, divided by its length; backward is the difference of
forward and backward together and forward alone. Bytes count each tensor once, in and out. The ratio is that of the
plain version's time, forward and backward, to this one's. A launch is TOKENS,HEADS,WARPS, of the streams and loss
ROWS,WARPS. The loss's kernel for Hopper GPUs is hopper,LINES: lines of 128 logits that a warpgroup works on at a time.
Those of heads-product and logsumexp are tiles, as tune_matmul.py has them.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench_attention import chain, median_ms
from tune_matmul import parse_tile

from senano_jax.errors import UserError, one_line_errors
from senano_jax.jax_settings import start_jax
from senano_jax.kernels.triton import HeadLaunch, Launches, RowLaunch
from senano_jax.model import depth_attention, heads_kernels, hopper_loss, loss_kernel, stream_mix, stream_mlp
from senano_jax.model.cap import capped
from senano_jax.model.elementwise import norm, weighted_sum
from senano_jax.model.heads import prepare_heads
from senano_jax.model.heads_product import heads_matmul
from senano_jax.model.hopper_logsumexp import logsumexp
from senano_jax.model.loss import CHUNK_TOKENS
from senano_jax.model.pieces.gated_exclusive import gated_exclusive
from senano_jax.model.pieces.key_offset import offset_keys
from senano_jax.model.rotary import rotary_tables
from senano_jax.model.soft_cap import SoftCap

OF_HEADS = ("16,6,4", "16,3,4", "16,1,4", "8,6,2", "8,2,2", "8,1,2", "4,6,1", "32,6,8", "32,1,4")
OF_HEADS_PRODUCT = ("128,128,5,8,b,128", "128,128,5,8,a,128", "64,256,4,8,b,128", "64,128,6,8,b,128")
OF_ROWS = ("4,4", "2,2", "1,1", "8,8", "4,8")
OF_LOGITS = (*OF_ROWS, "1,4", "1,8", *(f"hopper,{lines}" for lines in (4, 8, 12, 16, 20)))
OF_LOGSUMEXP = ("128,128,5,8,b,64", "128,128,6,8,b,64", "128,192,4,8,b,64", "128,192,4,16,b,64", "128,192,4,8,a,64")
LOGITS = 50_304  # of a token
PASSES = ("fwd", "bwd", "f+b")


class Case(NamedTuple):
    """One of the kernels: two functions of the arguments for a launch, or None for XLA's version."""

    arguments: Sequence[jax.Array]
    forward: Callable[[str | None], Callable] | None  # None: only the backward pass is timed
    both: Callable[[str | None], Callable] | None  # None: only the forward pass is timed
    megabytes: tuple[float, float]  # forward and backward
    launches: Sequence[str]


def heads(shape: tuple[int, int, int, int], *, offsets_keys: bool = False) -> Case:
    """qkv, first_v and the rotary tables in, q, k and v out; back these and three gradients in, two gradients out."""
    batch, length, count, width = shape
    qkv, first_v, *gradients = random([(batch, length, 3 * count * width), *[shape] * 4])
    rotary = jax.jit(rotary_tables, static_argnums=(0, 1))(length, width)

    def prepare(launch):
        options = {"num_heads": count, "offsets_keys": offsets_keys, **_of_heads(launch)}
        return lambda qkv, first_v, w, *_: prepare_heads(qkv, first_v, w, rotary, **options)

    megabytes = [(parts * first_v.nbytes + 2 * rotary[0].nbytes) / 1e6 for parts in (7, 11)]
    arguments = (qkv, first_v, jnp.float32(0.5), *gradients)
    return Case(arguments, prepare, lambda launch: with_gradients(prepare(launch), 3), tuple(megabytes), OF_HEADS)


def heads_product(shape: tuple[int, int, int, int]) -> Case:
    """x, w and first_v in, q, k, v, own values and scales out; the plain version writes and reads the product, too."""
    batch, length, count, width = shape
    dim = count * width
    x, w, first_v = random([(batch, length, dim), (dim, 3 * dim), shape])
    rotary = jax.jit(rotary_tables, static_argnums=(0, 1))(length, width)

    def stored(x, w, first_v, share):
        launch = heads_kernels.DEFAULT_LAUNCHES.forward
        return heads_kernels.forward(x @ w, first_v, share, rotary, count, False, launch, False)

    def multiply(launch):
        if launch is None:
            return stored
        tile = parse_tile(launch, "--launches")
        return lambda x, w, first_v, share: heads_matmul(
            x, w, first_v, share, rotary, count, with_residuals=True, tile=tile
        )

    scales = 2 * 4 * batch * count * length
    megabytes = ((6 * first_v.nbytes + w.nbytes + 2 * rotary[0].nbytes + scales) / 1e6, 0.0)
    arguments = (x, w / dim**0.5, first_v, jnp.float32(0.5))
    return Case(arguments, multiply, None, megabytes, OF_HEADS_PRODUCT)


def offset(shape: tuple[int, int, int, int]) -> Case:
    """Keys in, keys with an offset out."""
    [k] = random([shape])

    def move(launch):
        if launch is None:
            return offset_keys
        return lambda k: heads_kernels.offset_keys(k, HeadLaunch(*_numbers(launch, 3)), False)

    return Case((k,), move, None, (2 * k.nbytes / 1e6, 0.0), OF_HEADS)


def gated(shape: tuple[int, int, int, int]) -> Case:
    """y and v in, y out; back these and a gradient in, two gradients out; the gates are small."""
    y, v, gradient = random([shape] * 3)
    small = jnp.full(shape[2:3], 0.3), jnp.full(shape[:3], 0.6)

    def apply(launch):
        return lambda y, v, share, gate, *_: gated_exclusive(y, v, share, gate, **_of_heads(launch))

    megabytes = [parts * y.nbytes / 1e6 for parts in (3, 5)]
    arguments = (y, v, *small, gradient)
    return Case(arguments, apply, lambda launch: with_gradients(apply(launch), 4), tuple(megabytes), OF_HEADS)


def stream(shape: tuple[int, int, int, int]) -> Case:
    """x, x0, what is added and two gradients in, two gradients out."""
    rows = (*shape[:2], shape[2] * shape[3])
    arrays = random([rows] * 5)
    weights = stream_mlp.StreamWeights(*map(jnp.float32, (0.9, 0.1, 1.0)))

    def plain(x, x0, added, d_out, d_normed):
        def both(x, x0, added, weights):
            total = weighted_sum((weights.x, x), (weights.x0, x0), (1.0, added), dtype=jnp.float32)
            return weights.sum * total, norm(total).astype(x.dtype)

        d_x, _, d_sum, d_weights = jax.vjp(both, x, x0, added, weights)[1]((d_out.astype(jnp.float32), d_normed))
        return d_sum, d_x, d_weights

    def fused(launch):
        given = RowLaunch(*_numbers(launch, 2))
        return lambda x, x0, added, d_out, d_normed: stream_mlp.backward(
            x, x0, added, weights, d_out, d_normed, launch=given, interpret=False
        )

    megabytes = (0.0, 7 * arrays[0].nbytes / 1e6)
    return Case(arrays, None, lambda launch: plain if launch is None else fused(launch), megabytes, OF_ROWS)


def mixture(shape: tuple[int, int, int, int]) -> Case:
    """The mixture, a skip connection, x0 and two gradients in, two gradients out; the plain one reads x, too."""
    rows = (*shape[:2], shape[2] * shape[3])
    x, skip, x0, *gradients = random([rows] * 5)
    weights = stream_mix.MixWeights(*map(jnp.float32, (0.9, 0.5, 0.1)))

    def plain(x, skip, x0, *gradients):
        pull_back = jax.vjp(functools.partial(stream_mix.stream_mix, implementation="plain"), x, skip, x0, weights)[1]
        d_x, d_skip, _, d_weights = pull_back(gradients)
        return d_x, d_skip, d_weights

    def fused(launch):
        given = RowLaunch(*_numbers(launch, 2))
        return lambda mixed, skip, x0, *gradients: stream_mix.backward(
            mixed, skip, x0, weights, *gradients, launch=given, interpret=False
        )

    megabytes = (0.0, 7 * x.nbytes / 1e6)
    arguments = (x, skip, x0, *gradients)
    return Case(arguments, None, lambda launch: plain if launch is None else fused(launch), megabytes, OF_ROWS)


def depth(shape: tuple[int, int, int, int]) -> Case:
    """The sources in, what is read out; back these and its gradient in, theirs out, and those of the blocks in and out,
    all copied first, as the chain does not let them be written in place."""
    rows = (*shape[:2], shape[2] * shape[3])
    arguments = _, own, *_ = random([(8, *rows), rows, rows, (8, *rows)])
    query = jax.random.normal(jax.random.key(4), rows[2:])

    def attend(launch):
        options = _in_both_directions(launch, RowLaunch, 2)
        return lambda blocks, own: depth_attention.attend_depth(blocks, own, query, jnp.int32(5), **options)

    def both(launch):
        def run(*arguments):
            (read, _), gradients = with_gradients(attend(launch), 2)(*arguments)
            return read, gradients

        return run

    megabytes = (7 * own.nbytes / 1e6, (18 + 16) * own.nbytes / 1e6)
    return Case(arguments, lambda launch: lambda *given: attend(launch)(*given[:2])[0], both, megabytes, OF_ROWS)


def loss(shape: tuple[int, int, int, int]) -> Case:
    """z in, its gradient out; what there is of each token is small."""
    cap = capped(SoftCap(), shape[2] * shape[3])
    [z] = random([(CHUNK_TOKENS, LOGITS)])
    targets = jax.random.randint(jax.random.key(1), (CHUNK_TOKENS, 1), 0, LOGITS)
    options = {"cap": cap.height, "slope": 1 / cap.divisor, "shift": cap.shift}

    def plain(z, targets):
        def total(z):
            logits = cap.all_logits(z)
            logsumexp = cap.logsumexp(logits)
            return (logsumexp - jnp.take_along_axis(logits, targets, axis=1)[:, 0]).sum(), logsumexp

        (_, logsumexp), dz = jax.value_and_grad(total, has_aux=True)(z)
        return logsumexp, dz

    def fused(launch):
        name, _, lines = launch.partition(",")
        if name == "hopper":
            if not lines.isdecimal():
                raise UserError(f"--launches {launch} is not hopper,LINES, such as hopper,12")
            return functools.partial(hopper_loss.logsumexp_and_gradient, step=int(lines), **options)
        given = RowLaunch(*_numbers(launch, 2))
        return functools.partial(loss_kernel.logsumexp_and_gradient, implementation="triton", launch=given, **options)

    megabytes = (0.0, 2 * z.nbytes / 1e6)
    return Case((z, targets), None, lambda launch: plain if launch is None else fused(launch), megabytes, OF_LOGITS)


def logits_sum(shape: tuple[int, int, int, int]) -> Case:
    """x and the head in; the plain version writes and reads the logits, too."""
    dim = shape[2] * shape[3]
    cap = capped(SoftCap(), dim)
    x, head = random([(CHUNK_TOKENS, dim), (dim, LOGITS)])
    options = {"cap": cap.height, "slope": 1 / cap.divisor, "shift": cap.shift}

    def add(launch):
        if launch is None:
            return lambda x, head: cap.logsumexp(cap.all_logits(x @ head))
        return functools.partial(logsumexp, tile=parse_tile(launch, "--launches"), **options)

    return Case((x, head), add, None, ((x.nbytes + head.nbytes) / 1e6, 0.0), OF_LOGSUMEXP)


CASES = {
    "heads": heads,
    "offset-heads": functools.partial(heads, offsets_keys=True),
    "heads-product": heads_product,
    "offset-keys": offset,
    "gated-exclusive": gated,
    "stream-mlp": stream,
    "stream-mix": mixture,
    "depth": depth,
    "loss": loss,
    "logsumexp": logits_sum,
}


def random(shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Normal numbers, bfloat16."""
    return [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]


def with_gradients(function: Callable, inputs: int) -> Callable:
    """Of its first arguments, so many; the others are the gradients of what comes out."""

    def run(*arguments):
        out, pull_back = jax.vjp(function, *arguments[:inputs])
        given = arguments[inputs:]
        return out, pull_back(given if isinstance(out, tuple) else given[0])

    return run


def table(case: Case, launches: Sequence[str], calls: int, repetitions: int) -> None:
    """Prints it line by line; a launch that does not work has one that says why."""
    columns = [*(f"{name + ' us':>8}" for name in PASSES), *(f"{name + ' GB/s':>9}" for name in PASSES), " ratio"]
    print(" " * 18, *columns)
    plain_us = None
    for launch in (None, *launches):
        name = launch or "plain"
        try:
            forward_us = 0.0 if case.forward is None else _measure(case.forward(launch), case, calls, repetitions)
            both_us = forward_us if case.both is None else _measure(case.both(launch), case, calls, repetitions)
        except UserError:
            raise
        except Exception as error:  # too many registers, no memory: the other rows still count
            reason = str(error) or type(error).__name__
            print(f"{name:>18} failed: {reason.splitlines()[0][:120]}", flush=True)
            continue
        plain_us = plain_us or both_us
        times = (forward_us, both_us - forward_us, both_us)
        megabytes = (*case.megabytes, sum(case.megabytes))
        speeds = [f"{1e3 * mb / us:9.0f}" if us else f"{'-':>9}" for mb, us in zip(megabytes, times)]
        print(f"{name:>18}", *(f"{us:8.1f}" for us in times), *speeds, f"{plain_us / both_us:6.2f}", flush=True)


def _of_heads(launch: str | None) -> dict:
    return _in_both_directions(launch, HeadLaunch, 3)


def _in_both_directions(launch: str | None, kind: type, count: int) -> dict:
    if launch is None:
        return {"implementation": "plain"}
    one = kind(*_numbers(launch, count))
    return {"implementation": "fused", "launches": Launches(one, one)}


def _numbers(launch: str, count: int) -> list[int]:
    try:
        numbers = [int(number) for number in launch.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(
            f"--launches {launch} is not {count} numbers with commas between, such as {'4,4,4'[: 2 * count - 1]}"
        )
    return numbers


def _measure(function: Callable, case: Case, calls: int, repetitions: int) -> float:
    """Microseconds of one call."""
    compiled = jax.jit(chain(function, calls)).lower(*case.arguments).compile()
    return 1e3 * median_ms(compiled, case.arguments, calls, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--launches", nargs="*", metavar="LAUNCH", help="to try instead of some for each kernel")
    parser.add_argument("--calls", type=int, default=16, help="length of a chain; all its outputs are kept")
    parser.add_argument("--repetitions", type=int, default=20)
    args = parser.parse_args()
    with one_line_errors():
        if unknown := [name for name in args.kernels if name not in CASES]:
            raise UserError(f"there is no kernel {unknown[0]}; the kernels are {', '.join(CASES)}")
        start_jax()
        shape = (args.batch, args.length, args.heads, args.width)
        print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, B T H K = {shape}, bfloat16")
        for name in args.kernels or CASES:
            case = CASES[name](shape)
            print(f"\n{name}: {case.megabytes[0]:.0f} MB forward, {case.megabytes[1]:.0f} MB backward")
            table(case, args.launches or case.launches, args.calls, args.repetitions)


if __name__ == "__main__":
    main()
