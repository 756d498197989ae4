"""python -m senano_jax.train [PRESET] [flags]: trains one system of the record table, or a variation of it."""

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from senano_jax.config import Config
from senano_jax.errors import one_line_errors
from senano_jax.presets import PRESETS, preset
from senano_jax.training.loop import train

_DESCRIPTION = """Trains a preset, or a variation of it, on token shards and reports its validation loss.

Presets: {presets}. Without one: recurrent if its shards are there, else demo.
The defaults below are those of {name}.
"""


def main(arguments: Sequence[str]) -> Path:
    """Parses `arguments`, runs, and returns the run folder."""
    name, flags = _choose_preset(list(arguments))
    config = tyro.cli(
        Config,
        default=preset(name),
        args=flags,
        prog="python -m senano_jax.train [PRESET]",
        description=_DESCRIPTION.format(presets=", ".join(PRESETS), name=name),
        config=(tyro.conf.AvoidSubcommands,),
    )
    configure_jax(config.dtype, config.compilation_cache)
    return train(config, name)


def configure_jax(dtype: str, compilation_cache: str | None) -> None:
    """Settings of the whole process: exact float32 products if asked for, and the cache of compiled programs."""
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would round to TF32
    if compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))


def _choose_preset(arguments: list[str]) -> tuple[str, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    files = preset("recurrent").data.train_files
    asks_for_help = "-h" in arguments or "--help" in arguments
    if asks_for_help or any(a.startswith("--data.train-files") for a in arguments) or glob.glob(files):
        return "recurrent", arguments
    print(
        f"No training shards at {files}; fetch them with: python scripts/download_fineweb.py\n"
        "Running the demo on the bundled sample instead."
    )
    return "demo", arguments


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
