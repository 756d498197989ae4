"""A comparison, or one run, as one web page that needs nothing else: tables, curves with their values, names to switch
off."""

import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from senano_jax.runlog.comparison import Group
from senano_jax.runlog.curves import ValidationPoint
from senano_jax.runlog.published import HistoryRow
from senano_jax.runlog.run_curve import RunCurve
from senano_jax.runlog.series import Series, difference_range, loss_range, series_of, time_unit
from senano_jax.runlog.styles import COLOURS, DARK_COLOURS, style_of
from senano_jax.runlog.tables import Table
from senano_jax.runlog.units import format_time, format_tokens

VALIDATION_LOSS = "validation loss, nats per token"
_TOKENS = "tokens trained on (millions)"
_TEMPLATE = Path(__file__).with_name("report.html")
_PLACE = re.compile(r"<!--[A-Z]+-->|/\*[A-Z]+\*/")


def html_report(
    groups: Sequence[Group],
    tables: Sequence[Table],
    remarks: Sequence[str],
    target: float,
    *,
    records: Sequence[HistoryRow] = (),
    refresh: float | None = None,
) -> str:
    """The page as text; names are shown as they are, whatever signs they hold. `records` are marked on the axis of
    tokens. The browser loads the page again every `refresh` seconds."""
    series = series_of(groups, target)
    styles = [_style(index, one) for index, one in enumerate(series)]
    words = "".join(_table(table) for table in tables) + "".join(
        f"<p>{html.escape(remark)}</p>\n" for remark in remarks
    )
    heading = f"Tokens to a validation loss of {target:g}"
    return _page(heading, words, styles, _charts(series, target, records), refresh)


def run_page(curve: RunCurve) -> str:
    """The page of one run: its training losses and evaluations, and these in a table. The evaluations are points: a
    line between two that are far apart would say what nobody measured."""
    training = {"label": "training loss, mean over the steps around", "colour": 0, "dash": "none", "marker": None}
    validation = {"label": "validation loss", "colour": 1, "dash": None, "marker": "o"}
    lines = [
        {"index": 0, "points": _millions(curve.smoothed), "seeds": [_millions(curve.training)]},
        {"index": 1, "points": _millions((p.tokens, p.val_loss) for p in curve.evaluations), "seeds": []},
    ]
    range_ = {"yMin": curve.lowest, "yMax": curve.highest, "level": None, "levelLabel": "", "signed": False}
    axis = {**range_, "yLabel": "loss, nats per token", "marks": []}
    chart = _chart(lines, "loss, by tokens", _TOKENS, None, True, axis)
    styles = [{"name": style["label"].split(",")[0], **style} for style in (training, validation)]
    return _page(curve.title, _table(_evaluations(curve), "narrow"), styles, [{**chart, "whole": True}], None)


def _page(heading: str, words: str, styles: list[dict], charts: list[dict], refresh: float | None) -> str:
    # "<" is all that could end the element early; JSON has another spelling for it.
    data = json.dumps({"styles": styles, "charts": charts}, allow_nan=False, separators=(",", ":"))
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{max(1, round(refresh))}">'
    places = {
        "<!--REFRESH-->": again,
        "<!--HEADING-->": html.escape(heading),
        "<!--TABLES-->": words,
        "/*COLOURS*/": _variables(COLOURS),
        "/*DARKCOLOURS*/": _variables(DARK_COLOURS),
        "/*DATA*/": data.replace("<", "\\u003c"),
    }
    return _PLACE.sub(lambda place: places[place[0]], _TEMPLATE.read_text(encoding="utf-8"))


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours))


def _charts(series: Sequence[Series], target: float, records: Sequence[HistoryRow]) -> list[dict]:
    unit, unit_ms = time_unit(series)
    low, high, target_shown = loss_range(series, target)
    loss_axis = {
        "yMin": low,
        "yMax": high,
        "yLabel": VALIDATION_LOSS,
        "level": target if target_shown else None,
        "levelLabel": f"target {target:g}",
        "signed": False,
    }
    in_order = sorted(records, key=lambda record: record.tokens)
    marks = [(record.tokens / 1e6, f"{format_tokens(record.tokens)} {record.name}") for record in in_order]
    by_tokens = _lines(series, lambda point: point.tokens / 1e6)
    by_time = _lines(series, lambda point: None if point.train_time_ms is None else point.train_time_ms / unit_ms)
    charts = [
        _chart(by_tokens, "validation loss, by tokens", _TOKENS, None, True, {**loss_axis, "marks": marks}),
        _chart(by_time, "validation loss, by time", f"training time ({unit})", unit_ms, False, loss_axis),
    ]
    if len(series) > 1:
        low, high = difference_range(series)
        axis = {"yMin": low, "yMax": high, "level": 0, "levelLabel": series[0].name, "signed": True}
        axis["yLabel"] = "difference, nats per token"
        lines = [
            {"index": index, "points": _millions(one.difference), "seeds": [_millions(d) for d in one.seed_differences]}
            for index, one in enumerate(series)
        ]
        charts.append(_chart(lines, f"loss minus that of {series[0].name}", _TOKENS, None, True, axis))
    return charts


def _chart(lines: list[dict], title: str, x_label: str, clock: float | None, logarithmic: bool, y_axis: dict) -> dict:
    """`clock` is the milliseconds of a unit of the x axis; None for an axis of tokens in millions."""
    points = [point[0] for line in lines for points in (line["points"], *line["seeds"]) for point in points]
    x_max = max([*points, *(mark[0] for mark in y_axis.get("marks", []))], default=1)
    names = {"title": title, "xLabel": x_label, "clock": clock, "logarithmic": logarithmic}
    return {"marks": [], **names, "xMax": 1.02 * (x_max or 1), **y_axis, "series": lines}


def _lines(series: Sequence[Series], x: Callable[[ValidationPoint], float | None]) -> list[dict]:
    def line(points: Sequence[ValidationPoint]) -> list[tuple[float, float]]:
        return [(at, _as_in_tables(point.val_loss)) for point in points if (at := x(point)) is not None]

    return [
        {"index": index, "points": line(one.curve), "seeds": [line(seed) for seed in one.seeds]}
        for index, one in enumerate(series)
    ]


def _millions(points) -> list[tuple[float, float]]:
    return [(tokens / 1e6, _as_in_tables(loss)) for tokens, loss in points]


def _as_in_tables(loss: float) -> float:
    return round(loss, 4)


def _style(index: int, one: Series) -> dict:
    style = style_of(index)
    return {
        "name": one.name,
        "label": f"{one.name}: {one.verdict}",
        "colour": style.colour,
        "dash": " ".join(f"{length:g}" for length in style.dashes) or "none",
        "marker": style.marker,
    }


def _evaluations(curve: RunCurve) -> Table:
    trained = dict(curve.smoothed)
    rows = [
        (
            format_tokens(point.tokens),
            "-" if point.step is None else f"{point.step:,}",
            f"{point.val_loss:.4f}",
            f"{trained[point.tokens]:.4f}" if point.tokens in trained else "-",
            "-" if point.train_time_ms is None else format_time(point.train_time_ms),
        )
        for point in curve.evaluations
    ]
    headers = ("tokens", "step", "validation loss", "training loss", "time")
    return Table("Evaluations", headers, tuple(rows))


def _table(table: Table, kind: str = "wide") -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in table.headers)
    body = "".join(
        "<tr>" + "".join(_cell(header, cell) for header, cell in zip(table.headers, row)) + "</tr>\n"
        for row in table.rows
    )
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n'
    )


def _cell(header: str, cell: str) -> str:
    return f'<td data-header="{html.escape(header)}">{html.escape(cell)}</td>'
