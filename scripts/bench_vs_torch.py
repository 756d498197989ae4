"""Step times of this project and of the PyTorch project's own training file, on the same GPUs, in one run, by turns.

    git clone https://github.com/lapp0/sample-efficient-nanogpt torch_repo
    python scripts/bench_vs_torch.py --torch-repo torch_repo --train-files 'data/fineweb10B/fineweb_train_*.bin'

The PyTorch file runs twice: as shipped (file names, number of steps, an endless loader and held windows apart), and the
fastest we could make it: without block checkpointing, with FlexAttention's default kernel options. Every substitution
must match exactly once. Ours is `python -m senano_jax.profile` on the same shards: the step that training runs, queued
as training queues it.

One GPU, or --gpus of one machine: torchrun starts as many processes of the PyTorch file, ours takes as many devices,
and both share the same tokens a step among them, the record's unless --batch-tokens and --seq-len say otherwise.

The attention window grows over a training run; here each of --windows is held for --steps steps. Times are medians
without the first steps of a window (compilation, queue). PyTorch's times are differences of its own step lines, read on
the host without waiting for the device, so that a single step may be off by the length of the launch queue; a median is
not. Flags after -- go to senano_jax.profile.
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
from senano_jax.errors import UserError, check_counts, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.interop.torch_program import (
    FASTEST,
    Patch,
    absolute_glob,
    batch,
    check_gpus,
    data_and_steps,
    last_lines,
    launch_command,
    output_of,
    patched_program,
)
from senano_jax.presets import preset
from senano_jax.windows import BLOCK

SHIPPED, BEST, OURS = "torch as shipped", "torch best", "ours"
VARIANTS = {"shipped": SHIPPED, "best": BEST, "ours": OURS}


@dataclass(frozen=True)
class StepTime:
    window: int  # blocks of 128 tokens
    ms: float


@dataclass(frozen=True)
class Run:
    program: str
    round: int  # from 1
    seconds: float  # of the whole process
    steps: tuple[StepTime, ...]  # those that count


@dataclass(frozen=True)
class Row:
    """Medians of one window; tokens_per_s and ratio by program."""

    window: int
    n: dict[str, int]
    ms: dict[str, float]
    tokens_per_s: dict[str, float]
    ours_faster_by: dict[str, float]  # our tokens/s over those of a PyTorch variant


def patches(
    train_files: str, windows: Sequence[int], steps: int, *, best: bool, split: Sequence[Patch] = ()
) -> list[Patch]:
    """What to change in the PyTorch file to time `steps` steps of each window on `train_files` (absolute), each step
    split over GPUs as the patches of `split` say."""
    held = f"128 * {tuple(windows)}[min(step // {steps}, {len(windows) - 1})]"
    return [
        *data_and_steps(train_files, steps * len(windows)),
        *split,
        Patch("windows", r"^( +window_size = ).*$", rf"\g<1>{held}"),
        Patch("validation off", r"^( +)if last_step or \(args\.val_loss_every", r"\1if False and (args.val_loss_every"),
        Patch("endless loader", r"^( +file_iter = )iter\(files\)", r'\1__import__("itertools").cycle(files)'),
        *(FASTEST if best else ()),
    ]


def parse_torch_log(text: str) -> list[float]:
    """Milliseconds of consecutive steps from lines such as `step:126/1700 train_time:519100ms step_avg:4119.84ms`."""
    lines = re.findall(r"^step:(\d+)/\d+ train_time:(\d+)ms", text, flags=re.MULTILINE)
    total_ms = {int(step): float(ms) for step, ms in lines}  # torchrun and the program's own log may repeat a line
    return [ms - total_ms.get(step - 1, 0.0) for step, ms in sorted(total_ms.items()) if step > 0]


def parse_report(report: dict) -> list[StepTime]:
    """Times of the steps queued back to back, from the `report` of senano_jax.profile's --json."""
    return [
        StepTime(speed["window_blocks"], ms)
        for speed in (report["speed"], *report["sweep"])
        for ms in speed["step_ms"]["times"]
    ]


def tabulate(runs: Sequence[Run], tokens_per_step: int) -> list[Row]:
    """One row a window, medians over all rounds."""
    times: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        for step in run.steps:
            times.setdefault(step.window, {}).setdefault(run.program, []).append(step.ms)
    rows = []
    for window in sorted(times):
        ms = {program: statistics.median(values) for program, values in times[window].items()}
        rate = {program: 1000 * tokens_per_step / median for program, median in ms.items()}
        faster = {p: rate[OURS] / rate[p] for p in rate if p != OURS and OURS in rate}
        rows.append(Row(window, {p: len(v) for p, v in times[window].items()}, ms, rate, faster))
    return rows


def medians(run: Run) -> str:
    """Such as "1,376.0 ms at a window of 1, 1,591.0 ms at 14": all that is known if the next program fails."""
    ms = {row.window: row.ms[run.program] for row in tabulate([run], tokens_per_step=0)}
    return ", ".join(f"{ms[window]:,.1f} ms at {'' if n else 'a window of '}{window}" for n, window in enumerate(ms))


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
    changes = patches(args.train_files, args.windows, args.steps, best=variant == "best", split=args.split)
    source = patched_program(args.torch_repo, changes)
    with tempfile.TemporaryDirectory(prefix="bench-torch-") as folder:
        (Path(folder) / "train_gpt.py").write_text(source, encoding="utf-8")
        start = time.perf_counter()
        output = output_of(launch_command(args.torch_python, args.gpus), folder, VARIANTS[variant])
        seconds = time.perf_counter() - start
    times = parse_torch_log(output)
    if len(times) != args.steps * len(args.windows):
        raise UserError(f"{VARIANTS[variant]}: {len(times)} step times found; last lines:\n{last_lines(output)}")
    counted = [
        StepTime(args.windows[i // args.steps], ms) for i, ms in enumerate(times) if i % args.steps >= args.warmup
    ]
    print(f"  the first step took {times[0] / 1000:.1f} s", flush=True)
    return Run(VARIANTS[variant], round_, seconds, tuple(counted))


def run_ours(args: argparse.Namespace, round_: int) -> Run:
    first, *others = map(str, args.windows)
    with tempfile.TemporaryDirectory(prefix="bench-ours-") as folder:
        report_file = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "senano_jax.profile", "recurrent", "--data.train-files", args.train_files]
        command += ["--devices", str(args.gpus)]
        command += ["--batch-tokens", str(args.batch_tokens), "--seq-len", str(args.seq_len)]
        command += ["--window-blocks", first, *(["--sweep", *others] if others else [])]
        command += ["--warmup", str(args.warmup), "--profile-steps", str(args.steps - args.warmup)]
        command += ["--json", str(report_file), *args.profile_flags]
        start = time.perf_counter()
        output_of(command, Path(__file__).resolve().parents[1], OURS)
        seconds = time.perf_counter() - start
        report = json.loads(report_file.read_text())["report"]
    return Run(OURS, round_, seconds, tuple(parse_report(report)))


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    runs: list[Run] = []
    environment = _environment(args)
    print("  ".join(f"{name}: {value}" for name, value in environment.items() if value), flush=True)
    for round_ in range(1, args.rounds + 1):
        for variant in args.variants:
            print(f"round {round_}: {VARIANTS[variant]} ...", flush=True)
            run = run_ours(args, round_) if variant == "ours" else run_torch(variant, args, round_)
            runs.append(run)
            print(f"  {len(run.steps)} steps that count, {run.seconds:.0f} s in all; {medians(run)}", flush=True)
    rows = tabulate(runs, args.batch_tokens)
    print("\n" + format_rows(rows, [VARIANTS[v] for v in args.variants]))
    print(f"window: blocks of 128 tokens; medians without the first {args.warmup} steps of a window; n steps")
    if args.gpus > 1:
        print(f"{args.gpus} GPUs, tokens/s of all of them together")
    if args.json:
        document = {
            "environment": environment,
            "gpus": args.gpus,
            "tokens_per_step": args.batch_tokens,
            "tokens_per_sequence": args.seq_len,
            "profile_flags": args.profile_flags,
            "windows": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        write_atomically(args.json, (json.dumps(document, indent=1) + "\n").encode())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked and with absolute paths; `split` is what the GPUs and the batch change in the PyTorch
    file."""
    record = preset("recurrent")
    argv, profile_flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-repo", type=expand_home, help="checkout of the PyTorch project")
    parser.add_argument("--train-files", help="glob of the training shards", default=record.data.train_files)
    parser.add_argument("--gpus", type=int, default=1, help="of this machine, for both programs (default: 1)")
    parser.add_argument("--batch-tokens", type=int, default=record.batch_tokens, help="of a step, on all GPUs together")
    parser.add_argument("--seq-len", type=int, default=record.seq_len, help="tokens of a sequence")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 14], help="in blocks of 128 tokens")
    parser.add_argument("--steps", type=int, default=24, help="of each window")
    parser.add_argument("--warmup", type=int, default=3, help="first steps of each window, not counted")
    parser.add_argument("--rounds", type=int, default=1, help="times that each program runs, by turns")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="to run")
    parser.add_argument(
        "--torch-python", type=os.path.expanduser, default=sys.executable, help="Python that has PyTorch"
    )
    parser.add_argument("--json", type=expand_home, help="file for all step times")
    args = parser.parse_args(argv)
    args.profile_flags = list(profile_flags)
    args.train_files = absolute_glob(args.train_files)
    check_output_file("--json", args.json)
    if args.steps <= args.warmup or args.warmup < 0 or args.rounds < 1:
        raise UserError("give --rounds of at least 1, and more --steps than --warmup steps")
    if min(args.windows) < 1 or len(set(args.windows)) < len(args.windows):
        raise UserError(f"--windows {' '.join(map(str, args.windows))}: give different numbers of at least 1")
    check_counts({"--gpus": args.gpus, "--batch-tokens": args.batch_tokens, "--seq-len": args.seq_len}, 1)
    if args.seq_len % BLOCK or args.batch_tokens % args.seq_len:
        raise UserError(
            f"--batch-tokens {args.batch_tokens}, --seq-len {args.seq_len}: give a batch of whole sequences, and "
            f"sequences of whole blocks of {BLOCK} tokens"
        )
    args.split = batch(args.gpus, args.batch_tokens // args.seq_len, args.seq_len)
    _check_machine(args)
    return args


def _check_machine(args: argparse.Namespace) -> None:
    """Raises UserError, before anything runs, for what would fail later."""
    least = (args.gpus + 1) * args.seq_len  # of which the PyTorch file's loader finds one micro-batch for each GPU
    if short := [file for file in find_shards(args.train_files) if len(open_shard(file)) < least]:
        raise UserError(f"{short[0]} holds less than {args.gpus + 1} sequences of {args.seq_len} tokens; leave it out")
    if {"shipped", "best"} & set(args.variants):
        if args.torch_repo is None:
            raise UserError("give --torch-repo, a checkout of https://github.com/lapp0/sample-efficient-nanogpt")
        for best in (False, True):
            changes = patches(args.train_files, args.windows, args.steps, best=best, split=args.split)
            patched_program(args.torch_repo, changes)
        if _ask([args.torch_python, "-c", "import torch; print(torch.cuda.is_available())"]) != "True":
            raise UserError(f"{args.torch_python} has no PyTorch that sees a GPU; give another --torch-python")
    check_gpus(args.gpus)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """GPU, driver and versions; an empty value for what is not known."""
    gpu, _, driver = _ask(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).partition(", ")
    has_torch = bool({"shipped", "best"} & set(args.variants))
    torch = _ask([args.torch_python, "-c", "import torch; print(torch.__version__)"]) if has_torch else ""
    return {
        "gpu": f"{args.gpus} x {gpu}" if args.gpus > 1 else gpu,
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


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
