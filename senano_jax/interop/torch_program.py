"""The PyTorch project's own training file, changed in a few lines so that it can be run beside this program."""

import glob
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.files import expand_home

LAST_LINES = 60  # shown of a run that failed; torchrun adds about 34 to the program's own


@dataclass(frozen=True)
class Patch:
    """One substitution in the PyTorch file."""

    what: str
    pattern: str  # matches exactly once, line by line
    replacement: str


DEFAULT_TILES = Patch("default kernel options", r"^ +kernel_options=\{[^}]*\},?\n", "")  # FlexAttention's own choice
# The fastest we could make it: nothing recomputed.
FASTEST = (
    Patch("checkpointing off", r"^( +)(x, v1 = checkpoint\(.*)$", r"\1# \2"),
    Patch("direct call", r"^( +)# (x, v1 = self\.blocks\[.*)$", r"\1\2"),
    DEFAULT_TILES,
)


OWN_BATCH = (16, 24_576)  # sequences of a step and tokens of a sequence, in the file as it is
SYSTEMS = ("recurrent", "no-value-embeddings")  # that the file can be


def schedule(system: str) -> tuple[Patch, ...]:
    """The order of the layers of `system`, one of SYSTEMS."""
    if system == "recurrent":
        return ()
    return (Patch("schedule", r"^( +self\.layer_seq = ).*$", r"\1list(range(12))"),)


def data_and_steps(train_files: str, steps: int) -> tuple[Patch, ...]:
    """The shards that match an absolute glob, and the length of the run. Raises UserError as `shards` does."""
    return (
        shards("train", train_files),
        Patch("number of steps", r"^( +num_iterations = ).*$", rf"\g<1>{steps}"),
    )


def batch(gpus: int, sequences: int, seq_len: int) -> tuple[Patch, ...]:
    """Steps of `sequences` sequences of `seq_len` tokens on `gpus` GPUs; one sequence is a micro-batch.

    The GPUs take the sequences by turns, so that those of a step are the same on any number of GPUs. The file counts
    the micro-batches of a GPU itself, for a number that divides 8; here they are given to it. Raises UserError for GPUs
    that the sequences cannot be dealt out to evenly.
    """
    if sequences % gpus:
        *fewer, last = (str(count) for count in range(1, sequences + 1) if sequences % count == 0)
        could_be = f"{', '.join(fewer)} or {last}" if fewer else last
        raise UserError(f"--gpus {gpus}: a step has {sequences} sequences to deal out evenly; use {could_be}")
    if (gpus, sequences, seq_len) == (1, *OWN_BATCH):
        return ()
    return (
        Patch("tokens of a sequence", r"^( +train_seq_len = ).*$", rf"\g<1>{seq_len}"),
        Patch("micro-batches", r"^( +grad_accum_steps_per_device = ).*$", rf"\g<1>{sequences // gpus}"),
    )


def shards(kind: str, pattern: str) -> Patch:
    """The "train" or "val" shards are those that match an absolute glob. Raises UserError for a glob with `**`."""
    if "**" in pattern:
        raise UserError(f"{pattern}: the PyTorch program reads ** as *; name the folder of the shards")
    return Patch(f"{kind} files", rf"^( +{kind}_files = ).*$", rf"\g<1>{literal(pattern)}")


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


def read_program(repository: Path) -> str:
    """The training file in a checkout. Raises UserError if it is not there or cannot be read."""
    file = repository / "train_gpt.py"
    if not file.is_file():
        raise UserError(f"{file} is missing; --torch-repo must be a checkout of the PyTorch project")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise UserError(f"{file} cannot be read ({reason}); check out the PyTorch project again") from None


def patched_program(repository: Path, to_apply: Sequence[Patch]) -> str:
    """The changed training file. Raises UserError as the two functions above do."""
    return apply_patches(read_program(repository), to_apply, f"{repository}/train_gpt.py")


def output_of(command: Sequence[str | Path], folder: str | Path, what: str) -> str:
    """What a program prints, run in `folder`. Raises UserError with the last lines of one that fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise UserError(f"{what}: {command[0]} cannot be started ({error.strerror or error})") from None
    if done.returncode:
        raise UserError(f"{what} failed with status {done.returncode}; its last lines:\n{last_lines(done.stdout)}")
    return done.stdout


def last_lines(output: str) -> str:
    """The end of what a program has printed, for an error."""
    return "\n".join(output.splitlines()[-LAST_LINES:])


def absolute_glob(pattern: str) -> str:
    """What the PyTorch program, to which every path is a glob, must be given to read what `find_shards` reads."""
    path = os.path.abspath(expand_home(pattern))
    return glob.escape(path) if os.path.lexists(path) else path


def from_anywhere(python: str) -> str:
    """The name of a program as another working directory needs it."""
    return os.path.abspath(python) if os.sep in python else python


def launch_command(python: str, gpus: int) -> list[str]:
    """Starts train_gpt.py of the working directory, which may be another than ours, with a process for each GPU."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    return [from_anywhere(python), *run, "train_gpt.py"]


def check_gpus(count: int) -> None:
    """Raises UserError if nvidia-smi lists fewer than `count` GPUs, or CUDA_VISIBLE_DEVICES leaves fewer of them."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=120, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        listed = []
    gpus = len([name for name in listed if name.strip()])
    if not gpus:
        raise UserError("no NVIDIA GPU here (nvidia-smi does not answer); run this on a machine with one")
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip()]))
    if gpus < count:
        raise UserError(f"--gpus {count}: this machine has {gpus} that may be used; choose fewer, or another machine")


def literal(text: str) -> str:
    """A Python string literal that is safe as the replacement of a regular expression."""
    return replacement(repr(text))


def replacement(text: str) -> str:
    """What stands for `text` as the replacement of a regular expression."""
    return text.replace("\\", "\\\\")
