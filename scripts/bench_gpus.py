"""Step times of presets on 1, 2, 4, ... GPUs of one machine, and how much of a step is communication.

    python scripts/bench_gpus.py recurrent tied-recurrent --gpus 1 4 --batch-tokens 393216 131072 --windows 1 14 \
        --forms replicated shared --json gpus.json

Each case is the last stage's step of a preset, compiled by itself, at attention windows of so many blocks of 128
tokens; its batch is that of all GPUs together. Times are medians of steps queued back to back, as training runs them.
Efficiency is the speed over N times that of one GPU at the same batch. Communication is what the first GPU's kernels of
collectives take in the last of the windows: all of it, waiting for other GPUs included, and the part in which no other
kernel runs (exposed). `shared` is --share-matrices, which one GPU has no use for.

A case that does not work (sequences that cannot be dealt out) is named and left out. The file of --json is written
anew after every case.
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from senano_jax.config import Config, changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.jax_settings import start_jax
from senano_jax.presets import preset
from senano_jax.profiling.compilation import compile_program
from senano_jax.profiling.kernels import COMMUNICATION, Event, busy_fraction, group_of, read_events
from senano_jax.profiling.timing import StepRunner
from senano_jax.profiling.tokens import open_feed
from senano_jax.runlog.writer import environment
from senano_jax.training.mesh import place_batch
from senano_jax.training.state import init_state
from senano_jax.training.wiring import wire

TRACED_STEPS = 2
OTHERWISE = 16_384  # tokens of a sequence, where those of the preset do not divide the batch
FORMS = ("replicated", "shared")


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str
    gpus: int
    batch_tokens: int
    form: str


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one case; by window where there are several."""

    case: Case
    seq_len: int
    micro_batches: int
    compile_s: float
    step_ms: dict[int, float]  # medians
    times_ms: dict[int, tuple[float, ...]]
    tokens_per_s: dict[int, float]
    communication_ms: float | None  # a step; None without a trace
    exposed_ms: float | None


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for name in args.presets:
        for batch in args.batch_tokens:
            for gpus in args.gpus:
                for form in args.forms:
                    if form == "replicated" or gpus > 1:
                        yield Case(name, gpus, batch, form)


def sequence_of(case: Case, asked: int | None) -> int:
    """Tokens of a sequence."""
    own = preset(case.preset).seq_len
    return asked or (own if case.batch_tokens % (own * case.gpus) == 0 else OTHERWISE)


def configured(case: Case, args: argparse.Namespace) -> Config:
    """Raises UserError for what cannot work."""
    config = changed(
        preset(case.preset),
        {
            "batch_tokens": case.batch_tokens,
            "seq_len": sequence_of(case, args.seq_len),
            "devices": case.gpus,
            "share_matrices": case.form == "shared",
            "data.train_files": args.train_files,
        },
    )
    check_config(config)
    return config


def measured(case: Case, args: argparse.Namespace) -> Result:
    config = configured(case, args)
    wiring = wire(config)
    stage, mesh = wiring.plan.stages[-1], wiring.mesh
    micro_batches = wiring.micro_batches[stage.index]
    feed = open_feed(config, stage, shards_required=False)
    with contextlib.closing(feed.batches):
        state = wiring.to_shared(init_state(wiring.model, wiring.optimizer, config.seed, mesh))
        tokens = place_batch(mesh, next(feed.batches), micro_batches)
        inputs = wiring.plan.inputs(stage.first)
        program = compile_program(wiring.train_steps[stage.index], state, tokens, *inputs)
        runner = StepRunner(program.run, inputs, state, mesh, micro_batches, feed)
        del state, tokens
        times = {}
        for window in args.windows:
            runner.steps(args.warmup, window)
            times[window] = runner.pipelined(args.steps, window)[0]
        communication, exposed = communication_ms(traced(runner, args.windows[-1]))
    return Result(
        case=case,
        seq_len=config.seq_len,
        micro_batches=micro_batches,
        compile_s=program.compilation.compile_s,
        step_ms={window: spread.median for window, spread in times.items()},
        times_ms={window: spread.times for window, spread in times.items()},
        tokens_per_s={window: 1000 * case.batch_tokens / spread.median for window, spread in times.items()},
        communication_ms=communication,
        exposed_ms=exposed,
    )


def traced(runner: StepRunner, window: int) -> list[Event]:
    """Kernels of the first device; none if the profiler does not work here."""
    with tempfile.TemporaryDirectory(prefix="senano-trace-") as folder:
        try:
            with jax.profiler.trace(folder):
                runner.steps(TRACED_STEPS, window)
        except jax.errors.JaxRuntimeError:
            return []
        return read_events(Path(folder))


def communication_ms(events: Sequence[Event], steps: int = TRACED_STEPS) -> tuple[float | None, float | None]:
    """What kernels of collectives take in a step, and what of it no other kernel covers; None without events."""
    if not events:
        return None, None
    ours = [event for event in events if group_of(event.name, None) == COMMUNICATION]
    others = [event for event in events if group_of(event.name, None) != COMMUNICATION]
    total, covered = _union_ns(events), _union_ns(others)
    return sum(event.duration_ns for event in ours) / 1e6 / steps, (total - covered) / 1e6 / steps


def _union_ns(events: Sequence[Event]) -> float:
    """Time in which at least one of the events runs."""
    if not events:
        return 0.0
    first = min(event.start_ns for event in events)
    last = max(event.start_ns + event.duration_ns for event in events)
    return busy_fraction(events) * (last - first)


def line(result: Result, results: Sequence[Result]) -> str:
    """One row of the table for each window."""
    case, rows = result.case, []
    for window, ms in result.step_ms.items():
        alone = next(
            (
                r.tokens_per_s[window]
                for r in results
                if r.case == dataclasses.replace(case, gpus=1, form="replicated") and window in r.tokens_per_s
            ),
            None,
        )
        efficiency = "-" if alone is None else f"{result.tokens_per_s[window] / case.gpus / alone:.1%}"
        rows.append(
            f"{case.preset:<18}{case.batch_tokens:>9,}{case.gpus:>5}  {case.form:<11}{window:>6}{ms:>10.1f}"
            f"{result.tokens_per_s[window]:>12,.0f}{efficiency:>11}"
        )
    if result.exposed_ms is not None:
        rows[-1] += f"{result.communication_ms:>10.2f}{result.exposed_ms:>9.2f}"
    return "\n".join(rows)


HEADER = (
    f"{'preset':<18}{'batch':>9}{'GPUs':>5}  {'matrices':<11}{'window':>6}{'ms a step':>10}{'tokens/s':>12}"
    f"{'efficiency':>11}{'comm. ms':>10}{'exposed':>9}"
)


def main(argv: Sequence[str]) -> list[Result]:
    args = _parse(argv)
    start_jax(compilation_cache=args.compilation_cache)
    found: list[Result] = []
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, JAX {jax.__version__}\n{HEADER}", flush=True)
    for case in cases(args):
        try:
            result = measured(case, args)
        except UserError as error:
            print(f"{case.preset} {case.batch_tokens:,} on {case.gpus}, {case.form}: left out ({error})", flush=True)
            continue
        found.append(result)
        print(line(result, found), flush=True)
        if args.json:
            document = {"environment": environment(), "results": [dataclasses.asdict(r) for r in found]}
            write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())
    if not found:
        raise UserError("no case could be measured; see above")
    return found


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", metavar="PRESET")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--batch-tokens", type=int, nargs="+", default=[393_216, 131_072], help="of a step, on all GPUs"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens of a sequence (default: the preset's, or {OTHERWISE} where that does not divide)",
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[14], help="in blocks of 128 tokens")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the averages of matrices")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each window")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--train-files", default=preset("recurrent").data.train_files, help="glob of training shards")
    parser.add_argument("--compilation-cache", help="folder; by default everything is compiled anew")
    parser.add_argument("--json", type=expand_home, help="file for all figures")
    args = parser.parse_args(argv)
    check_output_file("--json", args.json)
    numbers = {"--gpus": args.gpus, "--batch-tokens": args.batch_tokens, "--windows": args.windows}
    for flag, values in numbers.items():
        if min(values) < 1 or len(set(values)) < len(values):
            raise UserError(f"{flag} {' '.join(map(str, values))}: give different numbers of at least 1")
    if args.steps < 2 or args.warmup < 0:
        raise UserError(f"--steps {args.steps} --warmup {args.warmup}: give at least 2 steps")
    for name in args.presets:
        preset(name)
    return args


if __name__ == "__main__":
    import sys

    with one_line_errors():
        main(sys.argv[1:])
