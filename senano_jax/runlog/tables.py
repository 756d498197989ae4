"""The comparison in words: cells for a terminal, a Markdown file or a web page, the same in all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from senano_jax.runlog.comparison import Row
from senano_jax.runlog.units import format_time, format_tokens

SIGNIFICANCE = 0.01  # the speedrun's rule for a claimed record


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column is the name."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def comparison_tables(rows: Sequence[Row], target: float) -> list[Table]:
    """Tokens and losses; where there is something to test or to compare, tests; what the runs cost."""
    tables = [_results(rows, target)]
    if len(rows) > 1 or rows[0].p_below_target is not None:
        tables.append(_tests(rows, target))
    return [*tables, _costs(rows)]


def to_markdown(table: Table) -> str:
    """A GitHub table; the first column is the name, the others are figures."""
    lines = [table.headers, ("---",) + ("---:",) * (len(table.headers) - 1), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _results(rows: Sequence[Row], target: float) -> Table:
    headers = ("run", "parameters", "trained on", "final loss ± sd", f"tokens to {target:g} ± 95%", "saved")
    cells = [
        (
            row.name,
            _or_dash(row.parameters, "{:,}"),
            format_tokens(row.tokens_trained),
            _final_loss(row),
            _to_target(row),
            "first" if row is rows[0] else _saved(row),
        )
        for row in rows
    ]
    return Table("Results", headers, tuple(cells))


def _costs(rows: Sequence[Row]) -> Table:
    headers = ("run", "by", "hardware", "steps", "tokens read", "time", "tokens/s")
    cells = [
        (
            row.name,
            row.implementation,
            (row.hardware or "-").replace("NVIDIA ", ""),
            _or_dash(row.steps, "{:,}"),
            "-" if row.tokens_read is None else format_tokens(row.tokens_read),
            "-" if row.train_time_ms is None else format_time(row.train_time_ms),
            _or_dash(row.tokens_per_s, "{:,.0f}"),
        )
        for row in rows
    ]
    return Table("Cost", headers, tuple(cells))


def _final_loss(row: Row) -> str:
    if row.final_loss is None:
        return "diverged"
    loss = f"{row.final_loss.mean:.4f}"
    if row.final_loss.sd is not None:
        loss += f" ± {row.final_loss.sd:.4f} (n={row.n})"
    return loss if row.complete else f"{loss} (so far)"


def _to_target(row: Row) -> str:
    if row.final_loss is None:
        return "-"
    if row.tokens_to_target is None:
        return f"reached by {row.reached} of {row.n}" if row.reached else "not reached"
    text, half_width = format_tokens(row.tokens_to_target.mean), row.tokens_to_target.half_width()
    return text if half_width is None else f"{text} ± {format_tokens(half_width, like=row.tokens_to_target.mean)}"


def _tests(rows: Sequence[Row], target: float) -> Table:
    headers = (
        "run",
        f"p(mean loss < {target:g})",
        "final loss - first ± 95%",
        "Welch's p",
        "loss - first at common tokens",
    )
    cells = [
        (row.name, _p_below_target(row), *(("first",) * 3 if row is rows[0] else _against_first(row))) for row in rows
    ]
    return Table(f"Against {rows[0].name}", headers, tuple(cells))


def _p_below_target(row: Row) -> str:
    if row.final_loss is None:
        return "-"
    if row.p_below_target is None:
        return "needs 2 complete runs" if row.n < 2 or not row.complete else "no spread"
    verdict = "<" if row.p_below_target < SIGNIFICANCE else "not <"
    return f"{row.p_below_target:.2g}, {verdict} {SIGNIFICANCE:g}"


def _against_first(row: Row) -> tuple[str, str, str]:
    test, common = row.final_loss_test, "-"
    if row.common_tokens is not None and row.difference_at_common is not None:
        common = f"{row.difference_at_common:+.4f} at {format_tokens(row.common_tokens)}"
    if test is None:
        return "-", "-", common
    return f"{test.difference:+.4f} ± {test.half_width:.4f}", f"{test.p:.2g}", common


def _saved(row: Row) -> str:
    if not row.comparable:
        return "no comparison"
    if row.tokens_saved is None or row.saved_fraction is None:
        return "-"
    sign = "+" if row.tokens_saved > 0 else ""
    return f"{sign}{format_tokens(row.tokens_saved, like=row.tokens_to_target.mean)} ({row.saved_fraction:+.1%})"


def _or_dash(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)
