"""Tables on a terminal."""

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from senano_jax.runlog.short_names import LEAST_WIDTH, short_names
from senano_jax.runlog.tables import Table

_WIDTH = 99  # columns of a table of figures
_NAMES = 28  # columns that names keep while cells can still be broken into lines
_GAP = 2
_PIPE_WIDTH = 200  # columns when the output is no terminal: nothing is cut
_BREAKS = re.compile(r" (?=[(±])")  # in cells


def print_tables(tables: Sequence[Table], remarks: Sequence[str], *, figures: bool = True) -> None:
    """The tables and after them the remarks. All columns but the first hold `figures`, set right, or words. A table
    of figures is less than 100 columns wide if its cells, broken before brackets and ±, let it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    if figures:
        _print_figures(console, tables)
    else:
        for table in tables:
            console.print(_view(table, [None] * len(table.headers), "left"))
    for remark in remarks:
        lines = Text(remark).wrap(console, min(console.width, _WIDTH if figures else _PIPE_WIDTH) - _GAP)
        console.print(*lines, sep="\n" + " " * _GAP)


def clear_screen() -> None:
    """Where the output is a terminal."""
    Console().clear()


def _print_figures(console: Console, tables: Sequence[Table]) -> None:
    width = min(console.width, _WIDTH)
    names = list(dict.fromkeys(row[0] for table in tables for row in table.rows))
    fits = min(_widths(table, width)[0] for table in tables)
    shown = dict(zip(names, short_names(names, max(fits, LEAST_WIDTH))))
    for table in tables:
        rows = tuple((shown[row[0]], *row[1:]) for row in table.rows)
        short = Table(table.title, table.headers, rows)
        console.print(_view(short, _widths(short, width), "right"), "")
    cut = [(short, name) for name, short in shown.items() if short != name]
    if cut:
        console.print("Names in full")
        for short, name in cut:
            console.print(Text(f"{short:{max(len(short) for short, _ in cut)}}  {name}"), soft_wrap=True)
        console.print()


def _widths(table: Table, width: int) -> list[int]:
    """The columns' widths, together `width` or less where that can be: headers take two lines, names are shortened to
    _NAMES, then cells are broken, the widest first, then names are shortened to LEAST_WIDTH."""
    columns = list(zip(table.headers, *table.rows))
    words = [
        max(map(len, [*header.split(), *(piece for cell in cells for piece in _BREAKS.split(cell))]), default=0)
        for header, *cells in columns
    ]
    cells = [max(map(len, column[1:]), default=0) for column in columns]
    widths = [max(cell, word, len(column[0]) // 2 + 2) for cell, word, column in zip(cells, words, columns)]
    over = sum(widths) + _GAP * (len(widths) - 1) - width
    cut = max(0, min(over, widths[0] - _NAMES))
    widths[0], over = widths[0] - cut, over - cut
    while over > 0:
        breakable = [k for k in range(1, len(widths)) if widths[k] > words[k]]
        if not breakable:
            break
        widest = max(breakable, key=lambda k: widths[k])
        widths[widest], over = widths[widest] - 1, over - 1
    widths[0] = max(min(widths[0], LEAST_WIDTH), widths[0] - max(0, over))
    return widths


def _view(table: Table, widths: Sequence[int | None], justify: str) -> RichTable:
    view = RichTable(
        title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0),
        show_edge=False,
    )  # fmt: skip
    for index, (header, width) in enumerate(zip(table.headers, widths)):
        view.add_column(Text(header), justify=justify if index else "left", overflow="fold", width=width)
    for row in table.rows:
        view.add_row(*(Text(cell) for cell in row))
    return view
