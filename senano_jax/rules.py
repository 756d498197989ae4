"""python -m senano_jax.rules RUN_DIR: each rule of the track, kept, broken or not verifiable, with what was found."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from senano_jax.command_line import import_jax, parse
from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home
from senano_jax.runlog.tables import Table
from senano_jax.runlog.terminal import print_tables

if TYPE_CHECKING:
    from senano_jax.runlog.track_rules import Verdict

NOT_VERIFIABLE = 3  # 2 is an error


@dataclass(frozen=True)
class Arguments:
    """Hold a run against each rule of the track.

    Ends with status 0 if it keeps them all, 1 if it breaks one, 3 if it breaks none and one cannot be verified. The
    limit on parameters is two rules, rounded and strict: the system that holds the record breaks the strict one.
    """

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    json: bool = False
    """Print JSON instead of the table."""


def main(arguments: Arguments) -> int:
    """Checks, prints, and returns the exit status. Raises UserError for a folder that is not one of a run."""
    from senano_jax.runlog.track_rules import check_rules

    run_dir = expand_home(arguments.run_dir)
    verdicts = check_rules(run_dir)
    if arguments.json:
        document = {"run": str(run_dir), "rules": [dataclasses.asdict(verdict) for verdict in verdicts]}
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        rows = tuple((verdict.rule, verdict.status, verdict.figure) for verdict in verdicts)
        print_tables([Table(str(run_dir), ("rule", "", "found"), rows)], [], figures=False)
    return exit_status(verdicts)


def exit_status(verdicts: "list[Verdict]") -> int:
    """Of the command: 1 if a rule is broken, 3 if one cannot be verified, 0 if all are kept."""
    statuses = {verdict.status for verdict in verdicts}
    if "fail" in statuses:
        return 1
    return NOT_VERIFIABLE if "not verifiable" in statuses else 0


if __name__ == "__main__":
    with one_line_errors():
        arguments = parse(Arguments, sys.argv[1:], "python -m senano_jax.rules")
        import_jax()
        import jax

        from senano_jax.jax_settings import start_jax

        jax.config.update("jax_platforms", "cpu")  # only shapes are needed: GPUs stay with whoever uses them
        start_jax()
        sys.exit(main(arguments))
