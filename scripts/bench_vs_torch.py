"""Step times of this project and of the PyTorch project's own training file, on one GPU, in one run, by turns.

    git clone https://github.com/lapp0/sample-efficient-nanogpt torch_repo
    python scripts/bench_vs_torch.py --torch-repo torch_repo --train-files 'data/fineweb10B/fineweb_train_*.bin'

The PyTorch file runs twice: as shipped (file names, number of steps and an endless loader apart), and the fastest we
could make it: without block checkpointing, with FlexAttention's default kernel options. Every substitution must match
exactly once. Ours runs on the same shards and the same tokens: like the PyTorch loader it skips one sequence a step.

The attention window grows over a run, so times are compared window by window: medians over the steps with that window,
without the first steps of a run (compilation). PyTorch's times are differences of its own step lines, read on the host
without waiting for the device, so that a single step may be off by the length of the launch queue; a median is not.
Flags after -- go to senano_jax.train.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from senano_jax.data.shards import find_shards, open_shard
from senano_jax.data.stream import require_tokens
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import write_atomically
from senano_jax.optim.schedules import window_blocks
from senano_jax.presets import preset

SHIPPED, BEST, OURS = "torch as shipped", "torch best", "ours"
VARIANTS = {"shipped": SHIPPED, "best": BEST, "ours": OURS}
LAST_LINES = 15  # of a program that failed


@dataclass(frozen=True)
class Patch:
    """One substitution in the PyTorch file."""

    what: str
    pattern: str  # matches exactly once, line by line
    replacement: str


@dataclass(frozen=True)
class StepTime:
    step: int  # from 1
    window: int  # blocks of 128 tokens
    ms: float


@dataclass(frozen=True)
class Run:
    program: str
    round: int  # from 1; 0 for a log that was there before
    seconds: float | None  # of the whole process
    steps: tuple[StepTime, ...]


@dataclass(frozen=True)
class Row:
    """Medians of one window; tokens_per_s and ratio by program."""

    window: int
    n: dict[str, int]
    ms: dict[str, float]
    tokens_per_s: dict[str, float]
    ours_faster_by: dict[str, float]  # our tokens/s over those of a PyTorch variant


def patches(train_files: str, steps: int, *, best: bool) -> list[Patch]:
    """What to change in the PyTorch file to time `steps` steps on `train_files` (absolute)."""
    needed = [
        Patch("training files", r"^( +train_files = ).*$", rf"\g<1>{_literal(train_files)}"),
        Patch("number of steps", r"^( +num_iterations = ).*$", rf"\g<1>{steps}"),
        Patch("validation off", r"^( +)if last_step or \(args\.val_loss_every", r"\1if False and (args.val_loss_every"),
        Patch("endless loader", r"^( +file_iter = )iter\(files\)", r'\1__import__("itertools").cycle(files)'),
    ]
    if not best:
        return needed
    return [
        *needed,
        Patch("checkpointing off", r"^( +)(x, v1 = checkpoint\(.*)$", r"\1# \2"),
        Patch("direct call", r"^( +)# (x, v1 = self\.blocks\[.*)$", r"\1\2"),
        Patch("default kernel options", r"^ +kernel_options=\{[^}]*\},?\n", ""),
    ]


def apply_patches(source: str, to_apply: Sequence[Patch], name: str) -> str:
    """Raises UserError for a patch that does not match exactly once."""
    for patch in to_apply:
        source, count = re.subn(patch.pattern, patch.replacement, source, flags=re.MULTILINE)
        if count != 1:
            raise UserError(
                f"{name}: the place of '{patch.what}' was found {count} times instead of once; "
                "check out the revision with the 668.47M-token record"
            )
    return source


def parse_torch_log(text: str, final_window_tokens: int) -> list[StepTime]:
    """Times of consecutive steps from lines such as `step:126/1700 train_time:519100ms step_avg:4119.84ms`."""
    lines = re.findall(r"^step:(\d+)/(\d+) train_time:(\d+)ms", text, flags=re.MULTILINE)
    times = []
    previous_step, previous_ms = 0, 0
    for step, total, ms in ((int(a), int(b), int(c)) for a, b, c in lines):
        if step == previous_step:  # torchrun and the program's own log may repeat a line
            continue
        if step == previous_step + 1:
            window = window_blocks(step - 1, total, final_window_tokens)
            times.append(StepTime(step, window, float(ms - previous_ms)))
        previous_step, previous_ms = step, ms
    return times


def parse_metrics(text: str) -> list[StepTime]:
    """Times of the step lines of a run folder's metrics.jsonl."""
    records = [json.loads(line) for line in text.splitlines()]
    return [StepTime(r["step"], r["window"], r["step_ms"]) for r in records if "step_ms" in r]


def tabulate(runs: Sequence[Run], warmup: int, tokens_per_step: int) -> list[Row]:
    """One row a window, medians over all rounds; the first `warmup` steps of each run do not count."""
    times: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        for step in run.steps:
            if step.step > warmup:
                times.setdefault(step.window, {}).setdefault(run.program, []).append(step.ms)
    rows = []
    for window in sorted(times):
        ms = {program: statistics.median(values) for program, values in times[window].items()}
        rate = {program: 1000 * tokens_per_step / median for program, median in ms.items()}
        faster = {p: rate[OURS] / rate[p] for p in rate if p != OURS and OURS in rate}
        rows.append(Row(window, {p: len(v) for p, v in times[window].items()}, ms, rate, faster))
    return rows


def format_rows(rows: Sequence[Row], programs: Sequence[str]) -> str:
    """A plain table: window, then ms a step, tokens/s and n of each program, then ours over each PyTorch variant."""
    torch_programs = [p for p in programs if p != OURS] if OURS in programs else []
    header = ["window"]
    header += [f"{p} {what}" for p in programs for what in ("ms", "tokens/s", "n")]
    header += [f"ours / {p}" for p in torch_programs]
    cells = [header]
    for row in rows:
        line = [str(row.window)]
        for p in programs:
            line += [f"{row.ms[p]:,.1f}", f"{row.tokens_per_s[p]:,.0f}", str(row.n[p])] if p in row.ms else ["-"] * 3
        line += [f"{row.ours_faster_by[p]:.2f}x" if p in row.ours_faster_by else "-" for p in torch_programs]
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def run_torch(variant: str, args: argparse.Namespace, round_: int) -> Run:
    """Runs a patched copy of the PyTorch file in a folder of its own."""
    source_file = args.torch_repo / "train_gpt.py"
    source = source_file.read_text()
    source = apply_patches(source, patches(args.train_files, args.steps, best=variant == "best"), str(source_file))
    with tempfile.TemporaryDirectory(prefix="bench-torch-") as folder:
        (Path(folder) / "train_gpt.py").write_text(source)
        command = [args.torch_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        output, seconds = _run([*command, "train_gpt.py"], folder, VARIANTS[variant])
    times = parse_torch_log(output, args.preset.final_window_tokens)
    return _checked(Run(VARIANTS[variant], round_, seconds, tuple(times)), args.steps, output)


def run_ours(args: argparse.Namespace, round_: int) -> Run:
    """Runs senano_jax.train; its evaluation at the end is of one sequence of the training shards."""
    config = args.preset
    with tempfile.TemporaryDirectory(prefix="bench-ours-") as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "senano_jax.train", "recurrent", "--steps", str(args.steps)]
        command += ["--val-every", "0", "--run-dir", str(run_dir)]
        command += ["--data.train-files", args.train_files, "--data.val-files", args.train_files]
        command += ["--data.val-tokens", str(config.seq_len), "--data.val-seq-len", str(config.seq_len)]
        command += ["--data.discard-micro-batch", str(config.seq_len), *args.train_flags]
        output, seconds = _run(command, str(Path(__file__).resolve().parents[1]), OURS)
        times = parse_metrics((run_dir / "metrics.jsonl").read_text())
    return _checked(Run(OURS, round_, seconds, tuple(times)), args.steps, output)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    programs = [VARIANTS[v] for v in args.variants]
    runs = [_read_log(log, args) for log in args.torch_log]
    programs += [run.program for run in runs if run.program not in programs]
    environment = _environment(args)
    print("  ".join(f"{name}: {value}" for name, value in environment.items() if value), flush=True)
    for round_ in range(1, args.rounds + 1):
        for variant in args.variants:
            print(f"round {round_}: {VARIANTS[variant]} ...", flush=True)
            run = run_ours(args, round_) if variant == "ours" else run_torch(variant, args, round_)
            runs.append(run)
            first = next(step.ms for step in run.steps)
            print(f"  {len(run.steps)} steps in {run.seconds:.0f} s, the first in {first / 1000:.1f} s", flush=True)
    rows = tabulate(runs, args.warmup, args.preset.batch_tokens)
    print("\n" + format_rows(rows, programs))
    print(f"window: blocks of 128 tokens; medians without the first {args.warmup} steps of a run; n steps")
    if args.json:
        document = {
            "environment": environment,
            "steps": args.steps,
            "tokens_per_step": args.preset.batch_tokens,
            "warmup": args.warmup,
            "train_files": args.train_files,
            "train_flags": args.train_flags,
            "windows": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked and with absolute paths; `preset` is the configuration that both sides train."""
    argv, train_flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-repo", type=Path, help="checkout of the PyTorch project")
    parser.add_argument(
        "--train-files", help="glob of the training shards", default=preset("recurrent").data.train_files
    )
    parser.add_argument("--steps", type=int, default=40, help="of each run; the windows are stretched over them")
    parser.add_argument("--rounds", type=int, default=1, help="times that each program runs, by turns")
    parser.add_argument("--warmup", type=int, default=2, help="first steps of a run, not counted")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="to run, or none")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has PyTorch")
    parser.add_argument(
        "--torch-log", action="append", default=[], metavar="[NAME=]FILE", help="PyTorch log to tabulate too"
    )
    parser.add_argument("--json", type=Path, help="file for all step times")
    args = parser.parse_args(argv)
    args.preset, args.train_flags = preset("recurrent"), list(train_flags)
    args.train_files = os.path.abspath(args.train_files)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
    if args.steps <= args.warmup or args.warmup < 0 or args.rounds < 1:
        raise UserError("give --rounds of at least 1, and more --steps than --warmup steps")
    if args.variants:
        _check_machine(args)
    elif not args.torch_log:
        raise UserError("nothing to tabulate; give --variants to run or a --torch-log")
    return args


def _check_machine(args: argparse.Namespace) -> None:
    """Raises UserError, before anything runs, for what would fail later."""
    files = find_shards(args.train_files)
    if short := [file for file in files if len(open_shard(file)) < 2 * args.preset.seq_len]:
        raise UserError(f"{short[0]} holds less than two sequences of {args.preset.seq_len} tokens; leave it out")
    if "ours" in args.variants:
        step = args.preset.batch_tokens + args.preset.seq_len
        require_tokens(args.train_files, files, args.steps * step - args.preset.seq_len)
    if {"shipped", "best"} & set(args.variants):
        if args.torch_repo is None:
            raise UserError("give --torch-repo, a checkout of https://github.com/lapp0/sample-efficient-nanogpt")
        source = args.torch_repo / "train_gpt.py"
        if not source.is_file():
            raise UserError(f"{source} is missing; --torch-repo must be a checkout of the PyTorch project")
        for best in (False, True):
            apply_patches(source.read_text(), patches(args.train_files, args.steps, best=best), str(source))
        if _ask([args.torch_python, "-c", "import torch; print(torch.cuda.is_available())"]) != "True":
            raise UserError(f"{args.torch_python} has no PyTorch that sees a GPU; give another --torch-python")
    if not _ask(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]):
        raise UserError("no NVIDIA GPU here (nvidia-smi does not answer); run this on a machine with one")


def _read_log(argument: str, args: argparse.Namespace) -> Run:
    name, _, path = argument.rpartition("=")
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise UserError(f"--torch-log {path} cannot be read ({error.strerror or error})") from None
    times = parse_torch_log(text, args.preset.final_window_tokens)
    if not times:
        raise UserError(f"--torch-log {path} has no lines of consecutive steps (step:2/40 train_time:...ms)")
    return Run(VARIANTS.get(name, name or Path(path).stem), 0, None, tuple(times))


def _run(command: Sequence[str], folder: str, name: str) -> tuple[str, float]:
    """Output of a program and its seconds. Raises UserError with the last lines of one that fails."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise UserError(f"{name}: {command[0]} cannot be started ({error.strerror or error})") from None
    if done.returncode:
        raise UserError(f"{name} failed with status {done.returncode}; its last lines:\n{_tail(done.stdout)}")
    return done.stdout, time.perf_counter() - start


def _checked(run: Run, steps: int, output: str) -> Run:
    if len(run.steps) != steps:
        raise UserError(f"{run.program}: {len(run.steps)} of {steps} step times found; last lines:\n{_tail(output)}")
    return run


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-LAST_LINES:])


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """GPU, driver and versions; an empty value for what is not known."""
    gpu, _, driver = _ask(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).partition(", ")
    has_torch = bool({"shipped", "best"} & set(args.variants))
    torch = _ask([args.torch_python, "-c", "import torch; print(torch.__version__)"]) if has_torch else ""
    return {
        "gpu": gpu,
        "driver": driver.splitlines()[0] if driver else "",
        "python": sys.version.split()[0],
        "torch": torch,
        "jax": _ask([sys.executable, "-c", "import jax; print(jax.__version__)"]),
        "torch_commit": _ask(["git", "-C", str(args.torch_repo), "rev-parse", "HEAD"]) if args.torch_repo else "",
        "our_commit": _ask(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }


def _ask(command: Sequence[str]) -> str:
    """Standard output of a small program, stripped; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _literal(text: str) -> str:
    """A Python string literal that is safe as the replacement of a regular expression."""
    return repr(text).replace("\\", "\\\\")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
