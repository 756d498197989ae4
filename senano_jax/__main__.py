"""python -m senano_jax [COMMAND [arguments]]: all commands in one place; without arguments, what there is."""

import difflib
import inspect
import runpy
import shutil
import sys
import textwrap
from collections.abc import Sequence

from senano_jax.command_line import print_version
from senano_jax.config_file import to_text
from senano_jax.errors import UserError, one_line_errors
from senano_jax.presets import PRESETS, preset

# Each is a module of its own too: python -m senano_jax.train
COMMANDS = {
    "train": "train a preset, or a variation of it, and write a run folder",
    "evaluate": "validation loss of a run's checkpoint, or of PyTorch weights",
    "compare": "tokens to a target loss, of run folders and PyTorch logs, as table and plot",
    "sample": "text from saved weights",
    "export": "the weights of a run as a safetensors file",
    "profile": "where the time of a training step goes",
    "rules": "which rules of the track a run keeps",
}
_COLUMN = 22  # width of the first column


def main() -> None:
    """What the arguments of the process ask for."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        module = f"senano_jax.{arguments[0]}"
        sys.argv = [f"python -m {module}", *arguments[1:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    with one_line_errors():
        _own(arguments)


def _own(arguments: Sequence[str]) -> None:
    """What this module does itself. Raises UserError for a command that there is not."""
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print_version()
    elif first == "presets":
        _presets(arguments[1:])
    else:
        near = difflib.get_close_matches(first, [*COMMANDS, "presets"], n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)} and presets;"
        raise UserError(f"{first} is no command; {meant} python -m senano_jax --help tells more")


def _presets(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_table({name: _first_sentence(make) for name, make in PRESETS.items()}))
    elif len(arguments) > 1:
        raise UserError(f"presets takes one name, not {len(arguments)}; give the preset whose values to print")
    else:
        print(to_text(preset(arguments[0]), arguments[0]), end="")


def overview() -> str:
    """A line for every command and every preset."""
    presets_too = COMMANDS | {"presets [NAME]": "this list of presets; all values of one, for train --config FILE"}
    return "\n".join(
        [
            "usage: python -m senano_jax COMMAND [arguments]; COMMAND --help tells its arguments",
            "",
            "commands",
            _table(presets_too),
            "",
            "presets, for train and profile",
            _table({name: _first_sentence(make) for name, make in PRESETS.items()}),
            "",
            "first steps: python -m senano_jax train demo",
        ]
    )


def _table(rows: dict[str, str]) -> str:
    """Two columns; a text that is too long for the terminal is cut."""
    width = shutil.get_terminal_size().columns - _COLUMN - 3 if sys.stdout.isatty() else 10_000
    short = {name: textwrap.shorten(text, max(width, 20), placeholder=" …") for name, text in rows.items()}
    return "\n".join(f"  {name:<{_COLUMN}} {text}" for name, text in short.items())


def _first_sentence(function) -> str:
    text = " ".join(inspect.getdoc(function).split())
    return text.split(". ")[0].rstrip(".")


if __name__ == "__main__":
    main()
