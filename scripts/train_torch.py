"""Trains the PyTorch project's own file on the samples, and from the weights, that this program trains on and from.

    git clone https://github.com/lapp0/sample-efficient-nanogpt torch_repo
    python scripts/train_torch.py --torch-repo torch_repo --steps 200 --save-start start.pt --log torch.txt
    python -m senano_jax.train recurrent --steps 200 --val-every 25 --init-from start.pt --run-dir logs/same-start
    python -m senano_jax.compare torch.txt logs/same-start --out same_start.png

If the programs are equal, two runs from the same weights differ by rounding alone, so that far smaller differences
show than between seeds.

One GPU, or --gpus of one machine with a process each (torchrun). The sequences of a step are the same on any number of
them: they are dealt out by turns, and a GPU accumulates over its share.

What is changed in a copy of the file: names and lengths; a loader that reads all shards as one stream and leaves
nothing out (the original drops a micro-batch a step and the tails of shards), which every process holds in memory; the
loss of every step is printed, the mean over all GPUs; nothing is recomputed, and FlexAttention chooses its own tiles,
which is faster and computes the same function. Every substitution must match exactly once.
"""

import argparse
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from senano_jax.data.identity import needed_shards
from senano_jax.data.shards import find_shards, open_shard
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home
from senano_jax.interop.torch_program import (
    FASTEST,
    LAST_LINES,
    SYSTEMS,
    Patch,
    absolute_glob,
    batch,
    check_gpus,
    data_and_steps,
    launch_command,
    patched_program,
    read_program,
    replacement,
    schedule,
    shards,
)
from senano_jax.presets import preset


def patches(args: argparse.Namespace) -> list[Patch]:
    """What to change in the PyTorch file; paths in `args` are absolute."""
    last = args.steps if args.stop_after is None else args.stop_after
    config = preset(args.system)
    train_shards = _needed_shards("--train-files", args.train_files, last * config.batch_tokens)
    val_shards = _needed_shards("--val-files", args.val_files, args.val_tokens)
    needed = max(len(train_shards), len(val_shards))  # no more of them, since the stream is in memory
    several = f"{args.gpus} x " if args.gpus > 1 else ""
    weights = []
    if args.start:
        weights.append(f'model.load_state_dict(torch.load({str(args.start)!r})["model"])')
    at_end = [_saving(args.save_end, last)] if args.save_end else []
    if args.save_start:
        weights.append(_saving(args.save_start, 0))
    if last == 0:
        weights += [*at_end, "raise SystemExit"]
    return [
        *FASTEST,
        *data_and_steps(args.train_files, args.steps),
        *batch(args.gpus, config.batch_sequences, config.seq_len),
        shards("val", args.val_files),
        Patch("validation tokens", r"^( +val_tokens = ).*$", rf"\g<1>{args.val_tokens}"),
        Patch("steps between validations", r"^( +val_loss_every = ).*$", rf"\g<1>{args.val_every}"),
        Patch("digits of the validation loss", r"\{val_loss:\.4f\}", "{val_loss:.5f}"),
        Patch(
            "versions",
            r'^(print0\(f"Running PyTorch .*)$',
            rf'\1\nprint0(f"# PyTorch {{torch.__version__}}, {several}{{torch.cuda.get_device_name()}}", console=True)',
        ),
        *schedule(args.system),
        Patch("seed", r"^(model: nn\.Module = GPT\()", rf"torch.manual_seed({args.seed})\n\1"),
        Patch(
            "weights",
            r"^(    dist\.broadcast\(param\.detach\(\), 0\))$",
            "\\n".join([r"\1", *map(replacement, weights)]),
        ),
        Patch(
            "all shards as one stream",
            r"^    tokens, pos = _load_data_shard\(next\(file_iter\)\), 0$",
            rf"    tokens, pos = torch.cat([_load_data_shard(file) for file, _ in zip(file_iter, range({needed}))]), 0",
        ),
        # The loop asks for the next micro-batch when it has used one, and once more before it: one is dropped.
        Patch(
            "first micro-batch of a step",
            r"^    inputs, targets = next\(train_loader\)\n(    for i in range\(1,)",
            r"    step_loss = 0\n\1",
        ),
        Patch(
            "further micro-batches of a step",
            r"^( +)(loss = model\(inputs, targets, get_window_size_blocks\(step\)\))\n +inputs, targets = next\(.*$",
            r"\1inputs, targets = next(train_loader)\n\1\2\n\1step_loss += loss.detach()",
        ),
        Patch(
            "loss of a step",
            r'^( +)(print0\(f"step:\{step\+1\}/\{train_steps\} )(train_time)',
            rf"\1dist.all_reduce(step_loss)\n\1\2train_loss:{{step_loss.item() / {config.batch_tokens}:.5f}} \3",
        ),
        Patch(
            "end", r"^    if last_step:$", "\\n        ".join([f"    if step == {last}:", *map(replacement, at_end)])
        ),
    ]


def _saving(path: Path, step: int) -> str:
    """A line of Python by which one process keeps the weights, by their names in the model that is not compiled."""
    arrays = '{name.removeprefix("_orig_mod."): tensor.cpu() for name, tensor in model.state_dict().items()}'
    return f"if master_process: torch.save(dict(step={step}, model={arrays}), {str(path)!r})"


def train(args: argparse.Namespace) -> None:
    """Runs the changed file; its step lines go to the terminal and, with a heading, to `args.log`."""
    unfinished = _unfinished(args.log)
    steps = 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="train-torch-") as folder,
            unfinished.open("w", encoding="utf-8") as log,
        ):
            (Path(folder) / "train_gpt.py").write_text(args.source, encoding="utf-8")
            print(_heading(args), file=log, flush=True)
            for line in _lines_of(launch_command(args.torch_python, args.gpus), folder):
                if re.match(r"step:\d|# PyTorch ", line):
                    print(line, end="", flush=True)
                    print(line, end="", file=log, flush=True)
                    steps += line.startswith("step:")
    except (UserError, OSError, KeyboardInterrupt) as error:
        kept = f"the lines of its steps are in {unfinished}" if steps else "it made no step"
        if not steps:
            unfinished.unlink(missing_ok=True)
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise UserError(f"{what}\n{kept}" if "\n" in what else f"{what}; {kept}") from None
    unfinished.rename(args.log)


def _lines_of(command: Sequence[str], folder: str) -> Iterator[str]:
    """What a program prints, line by line. Raises UserError with the last ones of one that fails; ends with us."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        program = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started ({error.strerror or error})") from None
    try:
        for line in program.stdout:
            last.append(line.rstrip())
            yield line
    except BaseException:
        program.terminate()  # it would keep the GPUs
        program.wait()
        raise
    if program.wait():
        lines = "\n".join(last)
        raise UserError(f"the PyTorch program failed with status {program.returncode}; its last lines:\n{lines}")


def _unfinished(log: Path) -> Path:
    return log.with_name(log.name + ".unfinished")


def _heading(args: argparse.Namespace) -> str:
    digest = hashlib.sha256(read_program(args.torch_repo).encode()).hexdigest()
    start = f"weights from {args.start.name}" if args.start else f"its own first weights, seed {args.seed}"
    return (
        f"# The PyTorch program (github.com/lapp0/sample-efficient-nanogpt), {args.system}, {start}\n"
        f"# {date.today()}, train_gpt.py of SHA-256 {digest}\n"
        f"# its loader mended: every sequence once, in order; train_loss is the mean over the step"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked and with absolute paths; `source` is the changed file."""
    data = preset("recurrent").data
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-repo", type=expand_home, required=True, help="checkout of the PyTorch project")
    parser.add_argument("--log", type=expand_home, required=True, help="file for the step lines; must not exist")
    parser.add_argument("--system", choices=SYSTEMS, default="recurrent", help="default: recurrent")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine; the batch stays the same (default: 1)")
    parser.add_argument("--train-files", default=data.train_files, help="glob of the training shards")
    parser.add_argument("--val-files", default=data.val_files, help="glob of the validation shards")
    parser.add_argument("--val-tokens", type=int, default=data.val_tokens, help="tokens of a validation")
    parser.add_argument("--val-every", type=int, default=25, help="steps between validations (default: 25)")
    parser.add_argument("--steps", type=int, default=200, help="length of the schedules (default: 200)")
    parser.add_argument(
        "--stop-after",
        type=int,
        help="end after this many steps of them, without a last validation; 0 makes the first weights alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the program's own first weights (default: 0)")
    parser.add_argument("--start", type=expand_home, help="weights to begin with, from --save-start or export_torch.py")
    parser.add_argument("--save-start", type=expand_home, help="file for the weights it begins with; must not exist")
    parser.add_argument("--save-end", type=expand_home, help="file for the weights it ends with; must not exist")
    parser.add_argument(
        "--torch-python", type=os.path.expanduser, default=sys.executable, help="Python that has PyTorch"
    )
    args = parser.parse_args(argv)
    args.train_files, args.val_files = absolute_glob(args.train_files), absolute_glob(args.val_files)
    for name in ("log", "start", "save_start", "save_end"):
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises UserError, before anything runs, for what would fail later; leaves the changed file in `args.source`."""
    for name in ("gpus", "steps", "val_every", "val_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; use 1 or more")
    if args.stop_after is not None and not 0 <= args.stop_after < args.steps:
        raise UserError(f"--stop-after is {args.stop_after}; use less than the {args.steps} --steps, or leave it out")
    files = [("--log", args.log), ("--save-start", args.save_start), ("--save-end", args.save_end)]
    for (flag, path), (other, same) in itertools.combinations(files, 2):
        if path and path == same:
            raise UserError(f"{flag} and {other} are both {path}; choose two names")
    for flag, path in [*files, ("--log", _unfinished(args.log))]:
        if path and path.exists():
            raise UserError(f"{flag}: {path} exists already; choose another name, or delete it")
        check_output_file(flag, path)
    if args.start and not args.start.is_file():
        raise UserError(f"--start: {args.start} is missing; make it with --save-start or export_torch.py")
    if args.gpus > 1:
        check_gpus(args.gpus)
    args.source = patched_program(args.torch_repo, patches(args))
    at_a_time = args.gpus * preset(args.system).data.val_seq_len
    if args.val_tokens % at_a_time:
        where = f", {args.gpus} sequences" if args.gpus > 1 else ""
        raise UserError(f"--val-tokens is {args.val_tokens}; use a multiple of {at_a_time}{where}")


def _needed_shards(flag: str, pattern: str, tokens: int) -> list[Path]:
    """The first shards that match, as many as hold `tokens` and what the loader wants behind them."""
    files = needed_shards(find_shards(pattern), tokens + 1)
    available = sum(len(open_shard(file)) for file in files)
    if available < tokens + 2:
        raise UserError(f"{flag} {pattern}: {available:,} tokens, of which {tokens:,} are needed; give more shards")
    return files


if __name__ == "__main__":
    with one_line_errors():
        train(_parse(sys.argv[1:]))
