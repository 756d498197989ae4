"""The PyTorch project's own training file, changed in a few lines so that it can be run beside this program."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from senano_jax.errors import UserError

LAST_LINES = 60  # shown of a run that failed; torchrun adds about 34 to the program's own


@dataclass(frozen=True)
class Patch:
    """One substitution in the PyTorch file."""

    what: str
    pattern: str  # matches exactly once, line by line
    replacement: str


# The fastest we could make it: nothing recomputed, FlexAttention's own choice of tiles.
FASTEST = (
    Patch("checkpointing off", r"^( +)(x, v1 = checkpoint\(.*)$", r"\1# \2"),
    Patch("direct call", r"^( +)# (x, v1 = self\.blocks\[.*)$", r"\1\2"),
    Patch("default kernel options", r"^ +kernel_options=\{[^}]*\},?\n", ""),
)


def data_and_steps(train_files: str, steps: int) -> tuple[Patch, ...]:
    """The shards that match an absolute glob, and the length of the run. Raises UserError as `shards` does."""
    return (
        shards("train", train_files),
        Patch("number of steps", r"^( +num_iterations = ).*$", rf"\g<1>{steps}"),
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


def program_file(repository: Path) -> Path:
    """The training file in a checkout. Raises UserError if it is not there."""
    file = repository / "train_gpt.py"
    if not file.is_file():
        raise UserError(f"{file} is missing; --torch-repo must be a checkout of the PyTorch project")
    return file


def launch_command(python: str) -> list[str]:
    """Starts train_gpt.py of the working directory, which may be another than ours, on one GPU."""
    python = os.path.abspath(python) if os.sep in python else python
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train_gpt.py"]


def literal(text: str) -> str:
    """A Python string literal that is safe as the replacement of a regular expression."""
    return repr(text).replace("\\", "\\\\")
