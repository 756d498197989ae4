"""python -m senano_jax.train [PRESET|FILE.py:FUNCTION] [flags]: trains a preset, or a variation of it."""

import contextlib
import dataclasses
import glob
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from senano_jax.command_line import asks_for_help, import_jax, parse, switches, value_of, with_dashes
from senano_jax.config import Config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home
from senano_jax.preset_file import names_file
from senano_jax.presets import PRESETS, preset
from senano_jax.runlog.next_steps import draw_curve, next_steps

PROG = "python -m senano_jax.train [PRESET]"
GROUPS = {  # headings of --help: fields of Config and of Arguments
    "run": ("config", "dry_run", "run_dir", "resume", "init_from", "seed"),
    "length": ("steps", "batch_tokens", "seq_len", "initial_window_tokens", "final_window_tokens"),
    "evaluation": ("val_every", "evaluation_window_tokens"),
    "checkpoint": ("checkpoint_every", "checkpoint_keep", "checkpoint_keep_every"),
    "device": (
        "dtype",
        "devices",
        "micro_batches",
        "share_matrices",
        "reduce_dtype",
        "deterministic",
        "compilation_cache",
    ),
    "tracking": ("tensorboard", "wandb"),
}
_DESCRIPTION = """Trains a preset, or a variation of it, on token shards and reports its validation loss.

Presets: {presets}. Without one: recurrent if its shards are there, else demo.
FILE.py:FUNCTION is one of your own: a function that returns a senano_jax.Config.
The defaults below are those of {name}. Parts that it does not have, such as stages or an average, take no flags: they
come with a preset of their own.
"""


@dataclass(frozen=True)
class Arguments(Config):
    """The flags of the command: those of a run, and what to do with it."""

    config: Path | None = None
    """Repeat the run of this config.json, or folder of a run, in place of a preset; JSON or TOML. Flags change it."""
    dry_run: bool = False
    """Check everything that can be checked, say what the run would be, and end; nothing is written."""


class Request(NamedTuple):
    """What the arguments ask for."""

    config: Config
    preset: str
    """Name of the preset that `config` is derived from."""
    dry_run: bool
    notice: str
    """What to tell before the run."""


def main(arguments: Sequence[str]) -> Path | None:
    """Parses `arguments`, runs, and returns the run folder; None after a dry run, which leaves none."""
    request = parse_request(arguments)
    from senano_jax.training.stop import Stopped

    try:
        return run(request)
    except Stopped as stopped:  # saved, and said so: that is success to whoever sent the signal
        return stopped.run_dir


def parse_request(arguments: Sequence[str]) -> Request:
    """Raises UserError for arguments that name no run, and SystemExit for --help."""
    arguments = _bare_resume(with_dashes(arguments))
    name, default, flags, notice = _choose_defaults(arguments)
    args = parse(
        Arguments,
        flags,
        PROG,
        default=Arguments(**config_fields(default)),
        description=_DESCRIPTION.format(presets=", ".join(PRESETS), name=name),
        groups=GROUPS,
    )
    return Request(Config(**config_fields(args)), name, args.dry_run, notice)


def run(request: Request, keeps_steps: bool = False) -> Path | None:
    """Trains, and returns the run folder; None after a dry run. Raises Stopped if a signal stopped it. `keeps_steps` is
    for loop.train."""
    from senano_jax.jax_settings import start_jax
    from senano_jax.training.dry_run import describe
    from senano_jax.training.loop import train
    from senano_jax.training.processes import cause_first, join_processes

    if request.notice:
        print(request.notice)
    join_processes(request.config.run_dir)
    if request.dry_run:
        start_jax(request.config.dtype)  # without the cache of compiled programs, which it could write to
        describe(request.config, request.preset)
        return None
    with cause_first():
        return train(request.config, request.preset, keeps_steps=keeps_steps)


def config_fields(config: Config) -> dict:
    """The values of a Config's own fields, of one that may have more."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


def _choose_defaults(arguments: list[str]) -> tuple[str, Config, list[str], str]:
    """Name of the preset, the configuration that the flags change, the flags, and what to tell if they are sound."""
    name, config, arguments = take_preset(arguments, "train")
    file = value_of("--config", arguments)
    if name is not None and file is not None:
        raise UserError(
            f"{name} and --config {file} exclude each other: a run begins with one of them, flags change it"
        )
    if config is not None:
        return name, config, arguments, ""
    run_dir = value_of("--run-dir", arguments)
    resumes = any(argument.split("=")[0] == "--resume" for argument in arguments)
    if resumes and run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with")
    if resumes and file is not None:
        raise UserError(f"--resume goes on with the configuration of --run-dir {run_dir}; leave --config {file} out")
    if file is not None:
        path = expand_home(file)
        config, name = read_config(path / "config.json" if path.is_dir() else path)
        name = path.stem if name == "unknown" else name
        return name, dataclasses.replace(config, run_dir=None, resume=None), arguments, ""
    if resumes:
        config, name = read_config(expand_home(run_dir) / "config.json")
        return name, config, arguments, ""
    files = preset("recurrent").data.train_files
    if asks_for_help(arguments) or value_of("--data.train-files", arguments) or glob.glob(files):
        return "recurrent", preset("recurrent"), arguments, ""
    notice = (
        f"No training shards at {files}; fetch them with: python scripts/download_fineweb.py\n"
        "Running the demo on the bundled sample instead."
    )
    return "demo", preset("demo"), arguments, notice


def take_preset(
    arguments: list[str], command: str, kind: type[Config] = Arguments
) -> tuple[str | None, Config | None, list[str]]:
    """Name and configuration of the preset that `arguments` begin with, None twice if they begin with none, and the
    flags, which are those of `kind`.

    Raises UserError for one that stands elsewhere, and for another word in its place.
    """
    first, flags = (arguments[0], arguments[1:]) if arguments else ("-", [])
    if first.startswith("-"):
        without_value = switches(kind)
        for before, word in itertools.pairwise(arguments):
            last_part = with_dashes([before])[0].rpartition(".")[2].lstrip("-")
            is_value = before.startswith("--") and "=" not in before and last_part not in without_value
            if (word in PRESETS or names_file(word)) and not word.startswith("-") and not is_value:
                others = [argument for argument in arguments if argument != word]
                raise UserError(
                    f"{word} stands after flags; the preset comes first: python -m senano_jax.{command} "
                    f"{shlex.join([word, *others])}"
                )
        return None, None, arguments
    if first not in PRESETS and (expand_home(first) / "config.json").is_file():
        remedy = f"go on with it: python -m senano_jax.train --run-dir {shlex.quote(first)} --resume"
        raise UserError(f"{first} is the folder of a run, not a preset; {remedy}, or begin with --init-from {first}")
    if first not in PRESETS and os.path.lexists(expand_home(first)) and not names_file(first):
        raise UserError(f"{first} is a path, not a preset; say with a flag what it is, such as --init-from {first}")
    return first, preset(first), flags


def _bare_resume(arguments: list[str]) -> list[str]:
    """`--resume` without a value means the newest checkpoint."""
    result = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        result.append("--resume=latest" if argument == "--resume" and following.startswith("-") else argument)
    return result


def tell_next(run_dir: Path, seed: int) -> None:
    """Draws the curve of a run of `seed` that has ended, and prints what can be done with it."""
    curve, reason = draw_curve(run_dir)
    if reason:
        print(reason)
    print(next_steps(run_dir, curve, seed))


def command(arguments: Sequence[str]) -> None:
    """What this process does: as main, and afterwards a word on where the run is, unless a signal stopped it.

    It does not call main: only once the arguments are sound it may import JAX, and only with JAX it can leave the other
    processes of its run at once.
    """
    with one_line_errors(prints_result=False):
        request = parse_request(arguments)
        import_jax()
        import jax

        from senano_jax.training.processes import leave_at_once_on_failure
        from senano_jax.training.stop import Stopped
    with leave_at_once_on_failure(), one_line_errors(prints_result=False), contextlib.suppress(Stopped):
        run_dir = run(request, keeps_steps=not names_file(request.preset))  # its FUNCTION may have replaced others
        if run_dir is not None and jax.process_index() == 0:
            tell_next(run_dir, request.config.seed)


if __name__ == "__main__":
    command(sys.argv[1:])
