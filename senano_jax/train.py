"""python -m senano_jax.train [PRESET] [flags]: trains one system of the record table, or a variation of it."""

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from senano_jax.config import Config
from senano_jax.config_file import read_config
from senano_jax.errors import one_line_errors
from senano_jax.presets import PRESETS, preset
from senano_jax.training.loop import train
from senano_jax.training.processes import join_processes, leave_at_once_on_failure
from senano_jax.training.stop import Stopped

_DESCRIPTION = """Trains a preset, or a variation of it, on token shards and reports its validation loss.

Presets: {presets}. Without one: recurrent if its shards are there, else demo.
The defaults below are those of {name}.
"""


def main(arguments: Sequence[str]) -> Path:
    """Parses `arguments`, runs, and returns the run folder."""
    arguments = _bare_resume(with_dashes(arguments))
    name, default, flags = _choose_defaults(arguments)
    config = tyro.cli(
        Config,
        default=default,
        args=flags,
        prog="python -m senano_jax.train [PRESET]",
        description=_DESCRIPTION.format(presets=", ".join(PRESETS), name=name),
        config=(tyro.conf.AvoidSubcommands,),
    )
    join_processes()
    try:
        return train(config, name)
    except Stopped as stopped:  # saved, and said so: that is success to whoever sent the signal
        return stopped.run_dir


def _choose_defaults(arguments: list[str]) -> tuple[str, Config, list[str]]:
    """Name of the preset, the configuration that the flags change, and the flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], preset(arguments[0]), arguments[1:]
    run_dir = value_of("--run-dir", arguments)
    if run_dir is not None and any(a.split("=")[0] == "--resume" for a in arguments):
        config, name = read_config(Path(run_dir) / "config.json")
        return name, config, arguments
    files = preset("recurrent").data.train_files
    asks_for_help = "-h" in arguments or "--help" in arguments
    if asks_for_help or value_of("--data.train-files", arguments) or glob.glob(files):
        return "recurrent", preset("recurrent"), arguments
    print(
        f"No training shards at {files}; fetch them with: python scripts/download_fineweb.py\n"
        "Running the demo on the bundled sample instead."
    )
    return "demo", preset("demo"), arguments


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
