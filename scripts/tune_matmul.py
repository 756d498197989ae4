"""Speed of the product with an epilogue on one Hopper GPU, launch by launch, against XLA's; the winner belongs in Tile.

    python scripts/tune_matmul.py

Forward: relu(a b)^2. Backward: the gradient of that, with a side operand as large as the result. `dot` is the product
alone, `unfused` what XLA makes of product and epilogue. All launches run at the first of the rows and columns, the best
ones and the default at the others. Time is the median over repetitions, the programs by turns, so that a clock
that falls is shared by all. `wrong` counts numbers that are further than roundings from those of `unfused`.
"""

import argparse
import concurrent.futures
import contextlib
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from bench_attention import chain

from senano_jax.errors import UserError, check_counts, one_line_errors
from senano_jax.jax_settings import start_jax
from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import Tile
from senano_jax.model.squared_relu import gradient_of_square_of_relu, square_of_relu

FIELDS = ("rows", "columns", "stages", "group", "shared", "piece", "buffers", "lead")
LAUNCHES = (
    "ping-pong:128,128,5,8,a,128,1,0",  # the default
    "ping-pong:64,256,4,8,b,256,1,0",  # the same loads, instructions of twice the columns
    "ping-pong:128,192,4,8,b,64,1,0",
    "cooperative:256,128,4,8,a,64,1,0",  # as cuBLAS has it
    "cooperative:128,256,4,8,b,64,2,2",
    "overlapped:256,128,4,8,a,64,1,1",
    "overlapped:128,256,4,8,b,64,2,1",
    "overlapped:128,256,4,8,b,64,2,0",
    "overlapped:128,256,3,8,b,64,4,1",
    "overlapped:128,256,4,4,b,64,2,1",
    "overlapped:128,256,4,16,b,64,2,1",
)
REFERENCES = ("dot", "unfused")
CHAIN = 4  # calls of a program; a longer one takes as much longer to compile
EPILOGUES = {"forward": square_of_relu, "backward": gradient_of_square_of_relu}


@dataclass(frozen=True)
class Shape:
    """Of a product [rows, depth] x [depth, columns]."""

    rows: int
    depth: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.columns

    def operands(self, direction: str) -> list[jax.ShapeDtypeStruct]:
        """a, b and for the backward pass the side operand, in bfloat16."""
        sizes = [(self.rows, self.depth), (self.depth, self.columns), (self.rows, self.columns)]
        sizes = sizes if direction == "backward" else sizes[:2]
        return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]


@dataclass(frozen=True)
class Timing:
    """Of one program at one shape; without a time where `note` says why."""

    shape: Shape
    direction: str
    name: str  # of a launch or a reference
    us: float | None = None
    wrong: int = 0
    note: str = ""

    @property
    def tflops(self) -> float:
        """TFLOP/s of the product, whatever the epilogue takes."""
        return self.shape.flops / self.us / 1e6


def parse_launch(text: str) -> Tile:
    """Raises UserError for what is no FORM:ROWS,COLUMNS,STAGES,GROUP,SHARED,PIECE,BUFFERS or no possible tile."""
    form, _, values = text.partition(":")
    values = values.split(",")
    if len(values) != len(FIELDS):
        raise UserError(f"--launches {text}: give FORM:{','.join(FIELDS).upper()}, as in {LAUNCHES[0]}")
    try:
        sizes = {name: value if name == "shared" else int(value) for name, value in zip(FIELDS, values)}
        return Tile(form=form, **sizes)
    except ValueError as error:
        raise UserError(f"--launches {text}: {error}") from None


def function_of(name: str, direction: str):
    """What the program of that name computes, from the operands of a shape."""
    epilogue = EPILOGUES[direction]
    if name == "dot":
        return lambda a, b, *side: a @ b
    if name == "unfused":
        return lambda a, b, *side: epilogue(a @ b, *side)
    tile = parse_launch(name)
    return lambda a, b, *side: hopper_matmul.matmul(a, b, epilogue, *side, tile=tile)


def fastest(timings: list[Timing], direction: str, count: int) -> list[str]:
    """The launches of the shortest times among those whose numbers are right."""
    right = [t for t in timings if t.direction == direction and t.us is not None and not t.wrong]
    right = [t for t in right if t.name not in REFERENCES]
    return [t.name for t in sorted(right, key=lambda t: t.us)[:count]]


def table(timings: list[Timing]) -> list[str]:
    """Lines for one shape and direction, the fastest first and what has no time last."""
    shape, direction = timings[0].shape, timings[0].direction
    dot = next((t.us for t in timings if t.name == "dot" and t.us is not None), None)
    lines = [
        f"{direction}, [{shape.rows}, {shape.depth}] x [{shape.depth}, {shape.columns}]",
        f"{'':34} {'us':>8} {'TFLOP/s':>8} {'of dot':>7} {'wrong':>6}",
    ]
    for t in sorted(timings, key=lambda t: (t.us is None, t.us)):
        if t.us is None:
            lines.append(f"{t.name:34} {t.note}")
            continue
        share = f"{dot / t.us:7.3f}" if dot else f"{'-':>7}"
        lines.append(f"{t.name:34} {t.us:8.1f} {t.tflops:8.0f} {share} {t.wrong:6}")
    return lines


def verdict(timings: list[Timing], default: str = LAUNCHES[0]) -> list[str]:
    """For each direction the launch that takes least time over all shapes together, among those timed at all."""
    lines = []
    for direction in EPILOGUES:
        here = [t for t in timings if t.direction == direction and t.us is not None and not t.wrong]
        shapes = {t.shape for t in timings if t.direction == direction}
        sums = {}
        for name in {t.name for t in here} - set(REFERENCES):
            own = [t for t in here if t.name == name]
            if {t.shape for t in own} == shapes:
                sums[name] = sum(t.us for t in own)
        if not sums:
            lines.append(f"{direction}: no launch is right and timed at every shape")
            continue
        best = min(sums, key=sums.get)
        flops = sum(shape.flops for shape in shapes)
        gain = f", {sums[default] / sums[best]:.3f} times as fast as the default" if default in sums else ""
        lines.append(f"{direction}: {best} wins with {flops / sums[best] / 1e6:.0f} TFLOP/s over all shapes{gain}")
    return lines


@jax.jit
def _count_wrong(result, expected):
    """Numbers that differ by more than roundings, of which a square doubles the relative size."""
    result, expected = result.astype(jnp.float32), expected.astype(jnp.float32)
    allowed = 2.0**-6 * (jnp.abs(expected) + jnp.sqrt(jnp.mean(jnp.square(expected))))
    return jnp.sum(~(jnp.abs(result - expected) <= allowed))


class Tuner:
    """Compiles in threads, all before anything is timed, and times the programs of a shape by turns."""

    def __init__(self, runs: int, repetitions: int, deadline: float):
        self._runs, self._repetitions, self._deadline = runs, repetitions, deadline
        self._programs = {}  # by shape, direction and name: compiled, or why it is not

    def compile(self, wanted: list[tuple[Shape, str, str]]) -> None:
        """Those of the shapes, directions and names that are not compiled yet."""
        new = [key for key in dict.fromkeys(wanted) if key not in self._programs]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            self._programs.update(zip(new, pool.map(self._compile, new)))

    def _compile(self, key: tuple[Shape, str, str]):
        shape, direction, name = key
        if time.monotonic() > self._deadline:
            return "no time left"
        if name not in REFERENCES and not parse_launch(name).divides(shape.rows, shape.depth, shape.columns):
            return "does not divide this shape"
        # cuBLAS and nothing else: trying Triton's kernels takes longer than all the rest.
        options = {"xla_gpu_enable_triton_gemm": False} if name in REFERENCES else None
        program = jax.jit(chain(function_of(name, direction), CHAIN))
        try:
            return program.lower(*shape.operands(direction)).compile(options)
        except Exception as error:  # too many registers, no shared memory: the other rows still count
            return _reason(error)

    def time(self, shape: Shape, direction: str, names: list[str]) -> list[Timing]:
        """The compiled programs of those names; one that fails is a line of the table, not the end."""
        unfused = self._programs[shape, direction, "unfused"]
        if isinstance(unfused, str):
            return [Timing(shape, direction, name, note=f"no unfused result: {unfused}") for name in names]
        keys = jax.random.split(jax.random.key(0), 3)
        operands = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shape.operands(direction))]
        operands[1] /= shape.depth**0.5
        operands[2:] = [square_of_relu(side) for side in operands[2:]]
        expected = unfused(*operands)[-1]
        good, wrong, notes = {}, {}, {}
        for name in names:
            program = self._programs[shape, direction, name]
            if isinstance(program, str):
                notes[name] = program
                continue
            try:
                with _ended_if_it_hangs(f"{name}, {direction}, {shape}"):
                    last = jax.block_until_ready(program(*operands)[-1])
                wrong[name] = 0 if name == "dot" else int(_count_wrong(last, expected))
                good[name] = program
            except Exception as error:
                notes[name] = _reason(error)
        times = {name: [] for name in good}
        for _ in range(self._repetitions):
            for name, program in good.items():
                start = time.perf_counter()
                for _ in range(self._runs):
                    result = program(*operands)
                jax.block_until_ready(result)
                times[name].append(1e6 * (time.perf_counter() - start) / (self._runs * CHAIN))
        return [
            Timing(shape, direction, name, statistics.median(times[name]), wrong[name])
            if name in good
            else Timing(shape, direction, name, note=notes[name])
            for name in names
        ]


def _reason(error: Exception) -> str:
    return f"failed: {' '.join(f'{type(error).__name__} {error}'.split())[:100]}"


@contextlib.contextmanager
def _ended_if_it_hangs(what: str, seconds: float = 20):
    """Nothing else ends a kernel that waits for ever, and the process that waits for it."""

    def end():
        print(f"error: {what} does not end; leave it out of --launches", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main(argv: list[str] | None = None) -> list[Timing]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32768, 8192, 49152])
    parser.add_argument("--depth", type=int, default=768)
    parser.add_argument("--columns", type=int, nargs="+", default=[3072, 2816])
    parser.add_argument("--launches", nargs="+", default=LAUNCHES, metavar=f"FORM:{','.join(FIELDS).upper()}")
    parser.add_argument(
        "--keep", type=int, default=2, help="launches that run at the other shapes, besides the default"
    )
    parser.add_argument("--runs", type=int, default=6, help=f"of chains of {CHAIN} calls that are timed together")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="nothing is compiled after this")
    args = parser.parse_args(argv)
    counts = {"--depth": [args.depth], "--keep": [args.keep], "--runs": [args.runs]}
    counts |= {"--rows": args.rows, "--columns": args.columns, "--repetitions": [args.repetitions]}
    for flag, values in counts.items():
        for value in values:
            check_counts({flag: value}, least=1)
    for launch in args.launches:
        parse_launch(launch)
    start_jax()
    if not hopper_matmul.runs_here():
        raise UserError(
            "the kernel needs a Hopper GPU (compute capability 9.0) and JAX 0.11; here are"
            f" {jax.devices()[0].device_kind} and JAX {jax.__version__}: run this on an H100 or H200"
        )
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, bfloat16; launches are FORM:{','.join(FIELDS).upper()}")

    shapes = [Shape(rows, args.depth, columns) for columns in args.columns for rows in args.rows]
    tuner = Tuner(args.runs, args.repetitions, time.monotonic() + args.seconds)
    always = [*REFERENCES, LAUNCHES[0]]
    names = {direction: list(dict.fromkeys([*always, *args.launches])) for direction in EPILOGUES}
    every = []
    for some in (shapes[:1], shapes[1:]):
        tuner.compile([(shape, direction, name) for shape in some for direction in names for name in names[direction]])
        for shape in some:
            for direction in names:
                timings = tuner.time(shape, direction, names[direction])
                every += timings
                print("\n".join(["", *table(timings)]), flush=True)
        names = {
            direction: list(dict.fromkeys([*always, *fastest(every, direction, args.keep)])) for direction in names
        }
    print("\n".join(["", *verdict(every)]))
    return every


if __name__ == "__main__":
    with one_line_errors():
        main()
