"""Tables on a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from senano_jax.runlog.tables import Table

_PIPE_WIDTH = 200  # columns when the output is no terminal: nothing is cut


def print_tables(tables: Sequence[Table], remarks: Sequence[str], *, figures: bool = True) -> None:
    """The tables and after them the remarks; all columns but the first hold `figures`, set right, or words."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    for table in tables:
        view = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, header in enumerate(table.headers):
            view.add_column(Text(header), justify="right" if figures and index else "left", overflow="fold")
        for row in table.rows:
            view.add_row(*(Text(cell) for cell in row))
        console.print(view)
    for remark in remarks:
        console.print(Text(remark))
