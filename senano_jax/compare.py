"""python -m senano_jax.compare: tokens to a target loss, of our runs and of PyTorch logs, in a table and a plot."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.runlog.comparison import Group, Row, compare, notes, read_groups
from senano_jax.runlog.html_report import html_report
from senano_jax.runlog.plots import plot_image
from senano_jax.runlog.tables import comparison_tables, to_markdown
from senano_jax.runlog.terminal import print_tables

PLOT_SUFFIXES = (".png", ".svg", ".html")


@dataclass(frozen=True)
class Arguments:
    """Compare runs by the tokens they need for a target validation loss.

    Run folders that differ only in their seed are one row, with its spread and tests; NAME=LOG,LOG makes a row of any
    logs and names it. The first row is what the others are compared with.
    """

    logs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, text logs of PyTorch programs and llm.c, CSV files (columns tokens,val_loss), published:recurrent;
    NAME=LOG,LOG. LOG@TOKENS tells the tokens of a step of one log, LOG@131072x580+393216 those of a growing batch."""
    target: float = 3.28
    """Validation loss to reach."""
    tokens_per_step: int | None = None
    """Tokens of a step, for all text logs that do not tell them."""
    out: Path | None = None
    """Plot to write: FILE.png, FILE.svg, or FILE.html (one interactive page with the tables)."""
    json: Path | None = None
    """File for the figures, exact and with the curves."""
    markdown: bool = False
    """Print the tables as Markdown."""


def main(arguments: Arguments) -> None:
    """Reads, compares, prints and writes. Raises UserError for anything the user can mend."""
    arguments = dataclasses.replace(
        arguments,
        out=arguments.out and expand_home(arguments.out),
        json=arguments.json and expand_home(arguments.json),
    )
    _check(arguments)
    groups = read_groups(arguments.logs, arguments.tokens_per_step)
    rows, remarks = figures(groups, arguments.target)
    tables = comparison_tables(rows, arguments.target)
    if arguments.markdown:
        print("\n\n".join(to_markdown(table) for table in tables))
        print("".join(f"\n{remark}" for remark in remarks), end="\n" if remarks else "")
    else:
        print_tables(tables, remarks)
    if arguments.json:
        write_atomically(arguments.json, to_json(groups, rows, remarks, arguments.target).encode())
    if arguments.out and arguments.out.suffix == ".html":
        write_atomically(arguments.out, html_report(groups, tables, remarks, arguments.target).encode())
    elif arguments.out:
        write_atomically(arguments.out, plot_image(groups, arguments.target, arguments.out.suffix[1:]))


def figures(groups: Sequence[Group], target: float) -> tuple[list[Row], list[str]]:
    """The rows, and what to know about them: first what keeps them from being compared."""
    rows = compare(groups, target)
    return rows, [row.caution for row in rows if row.caution] + notes(groups)


def to_json(groups: Sequence[Group], rows: Sequence[Row], remarks: Sequence[str], target: float) -> str:
    """{"target", "notes", "rows": [{...figures, "runs": [{..., "points": [[tokens, loss, ms], ...]}]}]}; no NaN."""

    def run_of(run):
        points = [[point.tokens, point.val_loss, point.train_time_ms] for point in run.points]
        return {
            "name": run.name,
            "seed": run.seed,
            "complete": run.complete,
            "diverged": run.diverged,
            "points": points,
        }

    records = [
        {**dataclasses.asdict(row), "runs": [run_of(run) for run in group.runs]} for group, row in zip(groups, rows)
    ]
    document = {"target": target, "notes": list(remarks), "rows": records}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _check(arguments: Arguments) -> None:
    if not arguments.logs:
        raise UserError("no LOG given; give run folders or PyTorch logs, e.g. published:recurrent logs/*")
    if not (math.isfinite(arguments.target) and arguments.target > 0):
        raise UserError(f"--target is {arguments.target}; give a positive loss such as 3.28")
    if arguments.tokens_per_step is not None and arguments.tokens_per_step < 1:
        raise UserError(f"--tokens-per-step is {arguments.tokens_per_step}; give the tokens of one step, e.g. 393216")
    if arguments.out and arguments.out.suffix not in PLOT_SUFFIXES:
        raise UserError(
            f"--out {arguments.out}: cannot write {arguments.out.suffix or 'this'}; use {', '.join(PLOT_SUFFIXES)}"
        )
    for flag, path in (("--out", arguments.out), ("--json", arguments.json)):
        check_output_file(flag, path)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, prog="python -m senano_jax.compare"))
