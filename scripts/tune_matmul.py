"""Speed of the product with an epilogue on one Hopper GPU, tile by tile, against XLA's; the winners belong in TILES.

    python scripts/tune_matmul.py
    python scripts/tune_matmul.py --rows 8192 --columns 3072 --tiles 128,192,4,16,b,64

Forward: relu(a b)^2. Backward: the gradient of that, with a side operand as large as the result. `dot` is the product
alone, `unfused` what XLA makes of product and epilogue. Time is the median over repetitions, the programs by turns, so
that all share a falling clock. `wrong` counts numbers that are further than roundings from those of `unfused`.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench_attention import chain

from senano_jax.errors import UserError, check_counts, one_line_errors
from senano_jax.jax_settings import start_jax
from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import Tile
from senano_jax.model.squared_relu import gradient_of_square_of_relu, square_of_relu

FIELDS = ("rows", "columns", "stages", "group", "shared", "piece")
TEMPLATE = ",".join(FIELDS).upper()
CANDIDATES = (
    "128,192,4,8,b,64",  # these two are hopper_tile.TILES
    "128,128,5,8,a,128",
    "128,192,4,4,b,64",
    "128,192,4,16,b,64",
    "128,192,4,8,a,64",
    "128,192,3,8,b,192",
    "128,128,6,8,a,64",
    "128,128,5,8,b,128",
    "64,256,4,8,b,256",
)
REFERENCES = ("dot", "unfused")
CHAIN = 4  # calls of a program; a longer one takes as much longer to compile
RUNS = 6  # of a program that are timed together
EPILOGUES = {"forward": square_of_relu, "backward": gradient_of_square_of_relu}


class Shape(NamedTuple):
    """Of a product [rows, depth] x [depth, columns]."""

    rows: int
    depth: int
    columns: int


class Timing(NamedTuple):
    """Of one program: microseconds of a call, and the wrong ones among its numbers."""

    us: float
    wrong: int


def parse_tile(text: str, flag: str = "--tiles") -> Tile:
    """Raises UserError, which names the flag, for what does not follow TEMPLATE or is no possible tile."""
    values = text.split(",")
    if len(values) != len(FIELDS):
        raise UserError(f"{flag} {text}: give {TEMPLATE}, as in {CANDIDATES[0]}")
    try:
        return Tile(**{name: value if name == "shared" else int(value) for name, value in zip(FIELDS, values)})
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None


def measure(shape: Shape, direction: str, names: list[str], repetitions: int) -> dict[str, Timing | str]:
    """Of the references and tiles of those names; for one that cannot run, why."""
    a, b, side = (
        jax.random.normal(jax.random.key(n), size, jnp.bfloat16)
        for n, size in enumerate([shape[:2], shape[1:], (shape.rows, shape.columns)])
    )
    operands = [a, b / shape.depth**0.5, *([square_of_relu(side)] if direction == "backward" else [])]
    expected = _compile("unfused", direction, operands)(*operands)[-1]
    programs, wrong, reasons = {}, {}, {}
    for name in names:
        if name not in REFERENCES and not parse_tile(name).divides(*shape):
            reasons[name] = "does not divide this shape"
            continue
        try:
            program = _compile(name, direction, operands)
            result = program(*operands)[-1]
            wrong[name] = 0 if name == "dot" else int(count_wrong(result, expected))
            programs[name] = program
        except Exception as error:  # too many registers, no shared memory: the other rows still count
            reasons[name] = f"failed: {' '.join(f'{type(error).__name__} {error}'.split())[:100]}"
    times = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(RUNS):
                result = program(*operands)
            jax.block_until_ready(result)
            times[name].append(1e6 * (time.perf_counter() - start) / (RUNS * CHAIN))
    return {name: Timing(statistics.median(times[name]), wrong[name]) for name in programs} | reasons


def _compile(name: str, direction: str, operands: list[jax.Array]):
    """A chain of calls of the reference or tile of that name."""
    epilogue, tile = EPILOGUES[direction], None if name in REFERENCES else parse_tile(name)

    def call(a, b, *side):
        if tile is not None:
            return hopper_matmul.matmul(a, b, epilogue, *side, tile=tile)
        return a @ b if name == "dot" else epilogue(a @ b, *side)

    # cuBLAS and nothing else: trying Triton's kernels takes longer than all the rest.
    options = {"xla_gpu_enable_triton_gemm": False} if tile is None else None
    return jax.jit(chain(call, CHAIN)).lower(*operands).compile(options)


@jax.jit
def count_wrong(result, expected):
    """Numbers that differ by more than roundings, of which a square doubles the relative size."""
    result, expected = result.astype(jnp.float32), expected.astype(jnp.float32)
    allowed = 2.0**-6 * (jnp.abs(expected) + jnp.sqrt(jnp.mean(jnp.square(expected))))
    return jnp.sum(~(jnp.abs(result - expected) <= allowed))


def table(shape: Shape, direction: str, found: dict[str, Timing | str]) -> list[str]:
    """Lines, the fastest first and what has no time last. TFLOP/s are of the product, whatever the epilogue takes."""
    timed = {name: timing for name, timing in found.items() if isinstance(timing, Timing)}
    lines = [
        f"{direction}, [{shape.rows}, {shape.depth}] x [{shape.depth}, {shape.columns}]",
        f"{'':20} {'us':>8} {'TFLOP/s':>8} {'of dot':>7} {'wrong':>6}",
    ]
    for name, (us, wrong) in sorted(timed.items(), key=lambda row: row[1]):
        tflops = 2 * shape.rows * shape.depth * shape.columns / us / 1e6
        lines.append(f"{name:20} {us:8.1f} {tflops:8.0f} {timed['dot'].us / us:7.3f} {wrong:6}")
    return lines + [f"{name:20} {reason}" for name, reason in found.items() if name not in timed]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32768])
    parser.add_argument("--depth", type=int, default=768)
    parser.add_argument("--columns", type=int, nargs="+", default=[3072, 2816])
    parser.add_argument("--tiles", nargs="+", default=CANDIDATES, metavar=TEMPLATE)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args(argv)
    for flag, values in {"--rows": args.rows, "--columns": args.columns}.items():
        for value in values:
            check_counts({flag: value}, least=1)
    check_counts({"--depth": args.depth, "--repetitions": args.repetitions}, least=1)
    for tile in args.tiles:
        parse_tile(tile)
    start_jax()
    device = jax.devices()[0]
    if not hopper_matmul.runs_here():
        raise UserError(
            "the kernel needs a Hopper GPU (compute capability 9.0) and JAX 0.11; here are"
            f" {device.device_kind} and JAX {jax.__version__}: run this on an H100 or H200"
        )
    print(f"{device.device_kind}, JAX {jax.__version__}, bfloat16; tiles are {TEMPLATE}")
    for columns in args.columns:
        for rows in args.rows:
            shape = Shape(rows, args.depth, columns)
            for direction in EPILOGUES:
                found = measure(shape, direction, [*REFERENCES, *args.tiles], args.repetitions)
                print("\n".join(["", *table(shape, direction, found)]), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
