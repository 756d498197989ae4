"""python -m senano_jax.compare: tokens to a target loss, of our runs and of PyTorch logs, in a table and a plot."""

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from senano_jax.command_line import parse
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.runlog.comparison import Group, Row, cautions, compare, notes, read_groups
from senano_jax.runlog.html_report import html_report
from senano_jax.runlog.plots import plot_image
from senano_jax.runlog.published import HistoryRow, record_history
from senano_jax.runlog.tables import Table, comparison_tables, to_markdown
from senano_jax.runlog.terminal import clear_screen, print_tables

PLOT_SUFFIXES = (".png", ".svg", ".html")
WATCH_SECONDS = "10"


@dataclass(frozen=True)
class Arguments:
    """Compare runs by the tokens they need for a target validation loss.

    Run folders that differ only in their seed are one row, with its spread and tests; NAME=LOG,LOG makes a row of any
    logs and names it. The first row is what the others are compared with.
    """

    logs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, text logs of PyTorch programs and llm.c, CSV files (columns tokens,val_loss), published:recurrent,
    published:value-embeddings; NAME=LOG,LOG. LOG@TOKENS tells the tokens of a step of one log, LOG@131072x580+393216
    those of a growing batch."""
    target: float = 3.28
    """Validation loss to reach."""
    tokens_per_step: int | None = None
    """Tokens of a step, for all text logs that do not tell them."""
    out: Path | None = None
    """Plot to write: FILE.png, FILE.svg, or FILE.html (one interactive page with the tables)."""
    records: bool = False
    """Mark the token counts of the record's history in the plot."""
    json: Path | None = None
    """File for the figures, exact and with the curves."""
    markdown: bool = False
    """Print the tables as Markdown."""
    watch: float | None = None
    """Read the logs again every so many seconds, 10 if none are given, and show and write what has changed, until
    Ctrl-C."""


def main(arguments: Arguments) -> None:
    """Reads, compares, prints and writes. Raises UserError for anything the user can mend."""
    arguments = dataclasses.replace(
        arguments,
        out=arguments.out and expand_home(arguments.out),
        json=arguments.json and expand_home(arguments.json),
    )
    _check(arguments)
    if arguments.watch is not None:
        _watch(arguments)
        return
    report = _report(arguments)
    _show(report, arguments)
    _write(report, arguments)


def with_seconds(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the seconds that a bare --watch means."""
    filled = []
    for word, following in zip(words, [*words[1:], ""]):
        filled.append(word)
        if word == "--watch" and not re.fullmatch(r"[+-]?[0-9.]+|nan|inf", following):
            filled.append(WATCH_SECONDS)
    return filled


@dataclass(frozen=True)
class _Report:
    groups: Sequence[Group]
    rows: Sequence[Row]
    tables: Sequence[Table]
    remarks: Sequence[str]


def _report(arguments: Arguments) -> _Report:
    groups = read_groups(arguments.logs, arguments.tokens_per_step)
    rows, remarks = figures(groups, arguments.target)
    return _Report(groups, rows, comparison_tables(rows, arguments.target), remarks)


def _show(report: _Report, arguments: Arguments) -> None:
    if arguments.markdown:
        print("\n\n".join(to_markdown(table) for table in report.tables))
        print("".join(f"\n{remark}" for remark in report.remarks), end="\n" if report.remarks else "")
    else:
        print_tables(report.tables, report.remarks)


def _write(report: _Report, arguments: Arguments, refresh: float | None = None) -> None:
    """The files that were asked for; a page that loads itself again every `refresh` seconds."""
    if arguments.json:
        content = to_json(report.groups, report.rows, report.remarks, arguments.target)
        write_atomically(arguments.json, content.encode())
    if arguments.out:
        records = records_within(report.groups) if arguments.records else []
        if arguments.out.suffix == ".html":
            page = html_report(
                report.groups, report.tables, report.remarks, arguments.target, records=records, refresh=refresh
            )
            write_atomically(arguments.out, page.encode())
        else:
            image = plot_image(report.groups, arguments.target, arguments.out.suffix[1:], records)
            write_atomically(arguments.out, image)


def _watch(arguments: Arguments) -> None:
    """Shows and writes the report whenever a log has changed, until the user interrupts, which is no error. A log that
    cannot be read, or has no evaluation yet, is waited for."""
    report = shown = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                report, state = (now := _report(arguments)), now.groups
            except UserError as error:
                state = f"waiting: {error}"
            if state != shown:
                clear_screen()
                if isinstance(state, str):
                    print(state)
                else:
                    _show(report, arguments)
                    _write(report, arguments, refresh=arguments.watch)
                print(f"as of {time.strftime('%H:%M:%S')}, read every {arguments.watch:g} s; Ctrl-C ends", flush=True)
                shown = state
            time.sleep(arguments.watch)
    if report is not None:
        _write(report, arguments)  # the page no longer loads itself again


def figures(groups: Sequence[Group], target: float) -> tuple[list[Row], list[str]]:
    """The rows, and what to know about them: first what keeps them from being compared."""
    rows = compare(groups, target)
    return rows, cautions(rows) + notes(groups)


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


def records_within(groups: Sequence[Group]) -> list[HistoryRow]:
    """The records whose token counts are near the ends of the groups' runs, or between them."""
    ends = [run.tokens_trained for group in groups for run in group.runs]
    return [record for record in record_history() if min(ends) / 1.25 <= record.tokens <= max(ends) * 1.25]


def _check(arguments: Arguments) -> None:
    if not arguments.logs:
        raise UserError("no LOG given; give run folders or PyTorch logs, e.g. published:recurrent logs/*")
    if not (math.isfinite(arguments.target) and arguments.target > 0):
        raise UserError(f"--target is {arguments.target}; give a positive loss such as 3.28")
    if arguments.tokens_per_step is not None and arguments.tokens_per_step < 1:
        raise UserError(f"--tokens-per-step is {arguments.tokens_per_step}; give the tokens of one step, e.g. 393216")
    if arguments.watch is not None and not 1 <= arguments.watch <= 86_400:
        raise UserError(f"--watch is {arguments.watch:g}; give the seconds between two looks at the logs, 1 to 86400")
    if arguments.out and arguments.out.suffix not in PLOT_SUFFIXES:
        raise UserError(
            f"--out {arguments.out}: cannot write {arguments.out.suffix or 'this'}; use {', '.join(PLOT_SUFFIXES)}"
        )
    for flag, path in (("--out", arguments.out), ("--json", arguments.json)):
        check_output_file(flag, path)


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Arguments, with_seconds(sys.argv[1:]), "python -m senano_jax.compare"))
