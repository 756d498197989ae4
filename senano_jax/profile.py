"""python -m senano_jax.profile [PRESET] [flags of train]: where the time of a training step goes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from senano_jax.command_line import import_jax, parse
from senano_jax.config import Config
from senano_jax.config_check import check_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, with_home, write_atomically
from senano_jax.plan import Plan
from senano_jax.presets import PRESETS, preset
from senano_jax.runlog.tables import Table
from senano_jax.train import GROUPS, config_fields, take_preset

if TYPE_CHECKING:
    from senano_jax.profiling.measure import Report

PROG = "python -m senano_jax.profile [PRESET]"
MEASUREMENT = (
    "stage", "window_blocks", "sweep", "evaluation", "profile_steps", "warmup", "trace_dir", "json",
)  # fmt: skip
UNUSED = (
    "val_every", "run_dir", "resume", "checkpoint_every", "checkpoint_keep", "checkpoint_keep_every", "init_from",
    "tensorboard", "wandb",
)  # fmt: skip

_PIPE_WIDTH = 200  # columns when the output is no terminal: nothing is cut

_DESCRIPTION = """Compiles the training step of a preset, or of a variation of it, runs it, and reports the phases of
compilation, FLOPs, memory, step times, model FLOPs utilisation (MFU) and where the time goes on the device.

Presets: {presets}. Without one: recurrent on a GPU, else demo.
Tokens: the training shards if they are there, else the bundled sample, or synthetic documents if it is too short.
The defaults below are those of {name}.
"""


@dataclass(frozen=True)
class Arguments(Config):
    """The flags of training, and what to measure."""

    stage: int | None = None
    """Stage to measure, counted from 0; the last one by default."""
    window_blocks: int | None = None
    """Long attention window in blocks of 128 tokens; that of the end of the stage by default."""
    sweep: tuple[int, ...] = ()
    """Repeat the timing for windows of so many blocks."""
    evaluation: bool = False
    """Time an evaluation too: on each device a sequence of --data.val-seq-len tokens, or several short ones."""
    profile_steps: int = 20
    """Timed steps."""
    warmup: int = 3
    """Steps before the timed ones."""
    trace_dir: Path | None = None
    """Keep the profiler's traces in this folder, for a viewer such as xprof or Perfetto."""
    json: Path | None = None
    """File for all figures."""


def main(arguments: Sequence[str]) -> "Report":
    """Parses, measures, prints and writes. Raises UserError for anything the user can mend."""
    named, base, flags = take_preset(list(arguments), "profile", Arguments)
    name, base = named or "recurrent", base or preset("recurrent")
    args = _parse(name, base, flags)
    import_jax()
    import jax

    from senano_jax.jax_settings import start_jax
    from senano_jax.profiling.measure import Scope, measure, to_json
    from senano_jax.profiling.report import remarks, tables
    from senano_jax.runlog.writer import environment

    if named is None:
        start_jax(deterministic=args.deterministic)  # XLA reads its flags once
        if jax.default_backend() != "gpu":
            name, base = "demo", preset("demo")
            args = _parse(name, base, flags)
    args = with_home(args)
    config = Config(**config_fields(args))
    check_config(config)
    _check(args)
    start_jax(config.dtype, config.compilation_cache, config.deterministic)

    plan = Plan(config)
    stage = plan.stages[-1 if args.stage is None else args.stage]
    window = args.window_blocks or plan.window(stage.end)
    swept = (w for w in args.sweep if w != window)
    scope = Scope(
        stage=stage.index,
        windows=(window, *swept),
        steps=args.profile_steps,
        warmup=args.warmup,
        evaluation=args.evaluation,
        trace_dir=args.trace_dir,
        shards_required=config.data.train_files != base.data.train_files,
    )
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    report = measure(config, scope, lambda line: console.print(Text(f"{line} ...")))
    which = f" of stage {report.stage} (0 to {report.stages - 1})" if report.stages > 1 else ""
    console.print(
        Text(
            f"{name}: {report.parameters:,} parameters, {config.dtype}, steps{which} of {report.tokens_per_step:,} "
            f"tokens on {report.devices} x {report.device_kind} (micro-batches: {report.micro_batches}; tokens of a "
            f"sequence: {report.seq_len:,}), read from {report.token_source}"
        )
    )
    for table in tables(report):
        _print(console, table)
    for remark in remarks(report):
        console.print(Text(remark))
    if args.json:
        document = json.dumps(to_json(report, config, name, environment()), indent=1, allow_nan=False)
        write_atomically(args.json, (document + "\n").encode())
    return report


def _parse(name: str, base: Config, flags: list[str]) -> Arguments:
    return parse(
        Arguments,
        flags,
        PROG,
        default=Arguments(**config_fields(base)),
        description=_DESCRIPTION.format(presets=", ".join(PRESETS), name=name),
        groups={"measurement": MEASUREMENT, **GROUPS},
        unused=UNUSED,
    )


def _check(args: Arguments) -> None:
    least_one = [("--window-blocks", args.window_blocks), ("--profile-steps", args.profile_steps)]
    for flag, value in [*least_one, *(("--sweep", window) for window in args.sweep)]:
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    stages = len(args.stages) or 1
    if args.stage is not None and not args.stages:
        raise UserError(f"--stage {args.stage}: the run has no stages; leave it out")
    if args.stage is not None and not 0 <= args.stage < stages:
        raise UserError(f"--stage is {args.stage}; the run has stages 0 to {stages - 1}")
    if args.warmup < 0:
        raise UserError(f"--warmup is {args.warmup}; it must not be negative")
    check_output_file("--json", args.json)
    if args.trace_dir and args.trace_dir.exists() and not args.trace_dir.is_dir():
        raise UserError(f"--trace-dir {args.trace_dir}: is a file; give a folder")


def _print(console: Console, table: Table) -> None:
    console.print(Text(f"\n{table.title}", style="bold"))
    view = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=any(table.headers), show_edge=False
    )
    words = {"kind", "module", "pass", "kernel"}
    for index, header in enumerate(table.headers):
        is_text = index == 0 or header in words
        view.add_column(Text(header), justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        view.add_row(*(Text(cell) for cell in row))
    console.print(view)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
