"""python -m senano_jax.train [PRESET|FILE.py:FUNCTION] [flags]: trains a preset, or a variation of it."""

import glob
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from senano_jax.config import Config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home
from senano_jax.preset_file import names_file
from senano_jax.presets import PRESETS, preset
from senano_jax.training.loop import train
from senano_jax.training.processes import join_processes, leave_at_once_on_failure
from senano_jax.training.stop import Stopped

# Flags without a value, or ends of their names.
_SWITCHES = (
    "tensorboard", "wandb", "unroll", "evaluation", "head-gate", "logit-bias", "by-width", "cautious", "mean-gradients",
)  # fmt: skip
_DESCRIPTION = """Trains a preset, or a variation of it, on token shards and reports its validation loss.

Presets: {presets}. Without one: recurrent if its shards are there, else demo.
FILE.py:FUNCTION is one of your own: a function that returns a senano_jax.Config.
The defaults below are those of {name}. Parts that it does not have, such as stages or an average, take no flags: they
come with a preset of their own.
"""


def main(arguments: Sequence[str]) -> Path:
    """Parses `arguments`, runs, and returns the run folder."""
    arguments = _bare_resume(with_dashes(arguments))
    name, default, flags, notice = _choose_defaults(arguments)
    config = tyro.cli(
        Config,
        default=default,
        args=flags,
        prog="python -m senano_jax.train [PRESET]",
        description=_DESCRIPTION.format(presets=", ".join(PRESETS), name=name),
        config=(tyro.conf.AvoidSubcommands,),
    )
    if notice:
        print(notice)
    join_processes()
    try:
        return train(config, name)
    except Stopped as stopped:  # saved, and said so: that is success to whoever sent the signal
        return stopped.run_dir


def _choose_defaults(arguments: list[str]) -> tuple[str, Config, list[str], str]:
    """Name of the preset, the configuration that the flags change, the flags, and what to tell if they are sound."""
    name, arguments = take_preset(arguments, "train")
    if name is not None:
        return name, preset(name), arguments, ""
    run_dir = value_of("--run-dir", arguments)
    resumes = any(argument.split("=")[0] == "--resume" for argument in arguments)
    if resumes and run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with")
    if resumes:
        config, name = read_config(expand_home(run_dir) / "config.json")
        return name, config, arguments, ""
    files = preset("recurrent").data.train_files
    asks_for_help = "-h" in arguments or "--help" in arguments
    if asks_for_help or value_of("--data.train-files", arguments) or glob.glob(files):
        return "recurrent", preset("recurrent"), arguments, ""
    notice = (
        f"No training shards at {files}; fetch them with: python scripts/download_fineweb.py\n"
        "Running the demo on the bundled sample instead."
    )
    return "demo", preset("demo"), arguments, notice


def take_preset(arguments: list[str], command: str) -> tuple[str | None, list[str]]:
    """The preset that `arguments` begin with, if they do, and the flags.

    Raises UserError for one that stands elsewhere, and for another word in its place.
    """
    first, flags = (arguments[0], arguments[1:]) if arguments else ("-", [])
    if first.startswith("-"):
        for before, word in itertools.pairwise(arguments):
            is_value = before.startswith("--") and "=" not in before and not before.endswith(_SWITCHES)
            if word in PRESETS and not is_value:
                others = [argument for argument in arguments if argument != word]
                raise UserError(
                    f"{word} stands after flags; the preset comes first: python -m senano_jax.{command} "
                    f"{shlex.join([word, *others])}"
                )
        return None, arguments
    if first not in PRESETS and (expand_home(first) / "config.json").is_file():
        remedy = f"go on with it: python -m senano_jax.train --run-dir {first} --resume"
        raise UserError(f"{first} is the folder of a run, not a preset; {remedy}, or begin with --init-from {first}")
    if first not in PRESETS and os.path.lexists(expand_home(first)) and not names_file(first):
        raise UserError(f"{first} is a path, not a preset; say with a flag what it is, such as --init-from {first}")
    preset(first)
    return first, flags


def _bare_resume(arguments: list[str]) -> list[str]:
    """`--resume` without a value means the newest checkpoint."""
    result = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        result.append("--resume=latest" if argument == "--resume" and following.startswith("-") else argument)
    return result


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The flags' names with dashes for underscores: both spellings are accepted."""
    spelt = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelt.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return spelt


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of `--flag value` or `--flag=value`, read before the flags are parsed."""
    for argument, following in zip(arguments, [*arguments[1:], None]):
        if argument == flag:
            return following
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


if __name__ == "__main__":
    with leave_at_once_on_failure(), one_line_errors(prints_result=False):
        main(sys.argv[1:])
