"""The comparison as one web page that needs nothing else: tables, curves with their values, names to switch off."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from senano_jax.runlog.comparison import Group
from senano_jax.runlog.curves import ValidationPoint
from senano_jax.runlog.plots import COLOURS, DASHES, Series, difference_range, loss_range, series_of, time_unit
from senano_jax.runlog.tables import Table
from senano_jax.runlog.units import format_tokens

_TEMPLATE = Path(__file__).with_name("report.html")
_SVG_DASHES = {"-": "none", "--": "7 3", "-.": "7 3 2 3", ":": "2 3"}


def html_report(groups: Sequence[Group], tables: Sequence[Table], remarks: Sequence[str], target: float) -> str:
    """The page as text; names are shown as they are, whatever signs they hold."""
    series = series_of(groups, target)
    data = {"styles": [_style(index, one) for index, one in enumerate(series)], "charts": _charts(series, target)}
    # "<" is all that could end the element early; JSON has another spelling for it.
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    words = "".join(map(_table, tables)) + "".join(f"<p>{html.escape(remark)}</p>\n" for remark in remarks)
    page = _TEMPLATE.read_text(encoding="utf-8")
    for placeholder, text in {"<!--TARGET-->": f"{target:g}", "<!--TABLES-->": words, "/*DATA*/": embedded}.items():
        before, after = page.split(placeholder, 1)
        page = before + text + after
    return page


def _charts(series: Sequence[Series], target: float) -> list[dict]:
    unit, unit_ms = time_unit(series)
    low, high, target_shown = loss_range(series, target)
    loss_axis = {
        "yMin": low,
        "yMax": high,
        "level": target if target_shown else None,
        "levelLabel": f"target {target:g}",
        "signed": False,
    }
    by_tokens = _lines(series, lambda point: point.tokens / 1e6)
    by_time = _lines(series, lambda point: None if point.train_time_ms is None else point.train_time_ms / unit_ms)
    charts = [
        _chart(by_tokens, "validation loss, by tokens", "tokens trained on (millions)", "M tokens", True, loss_axis),
        _chart(by_time, "validation loss, by time", f"training time ({unit})", unit, False, loss_axis),
    ]
    if len(series) > 1:
        low, high = difference_range(series)
        axis = {"yMin": low, "yMax": high, "level": 0, "levelLabel": series[0].name, "signed": True}
        lines = [
            {"index": index, "points": _millions(one.difference), "seeds": [_millions(d) for d in one.seed_differences]}
            for index, one in enumerate(series)
        ]
        title = f"loss minus that of {series[0].name}"
        charts.append(_chart(lines, title, "tokens trained on (millions)", "M tokens", True, axis))
    return charts


def _chart(lines: list[dict], title: str, x_label: str, unit: str, logarithmic: bool, y_axis: dict) -> dict:
    x_max = max(
        (point[0] for line in lines for points in (line["points"], *line["seeds"]) for point in points), default=1
    )
    names = {"title": title, "xLabel": x_label, "unit": unit, "logarithmic": logarithmic}
    return {**names, "xMax": 1.02 * (x_max or 1), **y_axis, "series": lines}


def _lines(series: Sequence[Series], x: Callable[[ValidationPoint], float | None]) -> list[dict]:
    def line(points: Sequence[ValidationPoint]) -> list[tuple[float, float]]:
        return [(at, point.val_loss) for point in points if (at := x(point)) is not None]

    return [
        {"index": index, "points": line(one.curve), "seeds": [line(seed) for seed in one.seeds]}
        for index, one in enumerate(series)
    ]


def _millions(differences: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(tokens / 1e6, difference) for tokens, difference in differences]


def _style(index: int, one: Series) -> dict[str, str]:
    colour = COLOURS[index % len(COLOURS)]
    reached = "not reached" if one.tokens_to_target is None else format_tokens(one.tokens_to_target, 1)
    return {
        "name": one.name,
        "label": f"{one.name}: {reached}",
        "colour": "currentColor" if colour == "#000000" else colour,  # black must turn white on a dark page
        "dash": _SVG_DASHES[DASHES[index % len(DASHES)]],
    }


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in table.headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
    )
