"""Pictures: a comparison's losses against tokens and time, with the differences to the first run; one run's curve."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from senano_jax.errors import UserError
from senano_jax.files import write_atomically
from senano_jax.runlog.comparison import Group
from senano_jax.runlog.curves import ValidationPoint
from senano_jax.runlog.html_report import run_page
from senano_jax.runlog.published import HistoryRow
from senano_jax.runlog.run_curve import RunCurve, run_curve
from senano_jax.runlog.series import Series, difference_range, loss_range, series_of, time_unit
from senano_jax.runlog.short_names import short_names
from senano_jax.runlog.styles import COLOURS, style_of
from senano_jax.runlog.units import format_tokens

_TOKENS = "tokens trained on (millions)"
_NAME_WIDTH = 32  # characters of a name in the legend
_STYLE = {
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "senano_jax",  # the same runs give the same file
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def plot_image(groups: Sequence[Group], target: float, image_format: str, records: Sequence[HistoryRow] = ()) -> bytes:
    """The comparison as a "png" or "svg" file, with `records` marked on the axis of tokens. Raises UserError if
    matplotlib is not installed."""
    try:
        return _image(
            lambda figure_class: _figure(figure_class, series_of(groups, target), target, records), image_format
        )
    except ImportError:
        raise UserError("plots need matplotlib; run pip install 'senano-jax[plot]'") from None


def write_curve(run_folder: Path) -> Path | None:
    """Draws the training losses and the evaluations of a run into its folder: curve.html, and curve.png if matplotlib
    is installed. Returns the path of curve.html; None, and writes nothing, if the run has no losses yet.

    Raises UserError if the run's files are damaged or the curve cannot be written; each file is whole or not there.
    """
    curve = run_curve(run_folder)
    if curve is None:
        return None
    page = run_folder / "curve.html"
    write_atomically(page, run_page(curve).encode())
    with contextlib.suppress(ImportError):
        write_atomically(run_folder / "curve.png", _image(lambda figure_class: _run_figure(figure_class, curve), "png"))
    return page


def _image(make_figure: Callable[[type], Any], image_format: str) -> bytes:
    """The file of the figure; raises ImportError if matplotlib is not installed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = make_figure(Figure)
        content = io.BytesIO()
        metadata = {"Date": None} if image_format == "svg" else {}
        figure.savefig(content, format=image_format, dpi=200, facecolor="white", metadata=metadata)
    return content.getvalue()


def _run_figure(figure_class: type, curve: RunCurve):
    figure = figure_class(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(*_columns(curve.training), color=COLOURS[0], lw=0.6, alpha=0.35)
    if curve.smoothed:
        axis.plot(
            *_columns(curve.smoothed), color=COLOURS[0], lw=1.6, label="training loss, mean over the steps around"
        )
    points = [(point.tokens, point.val_loss) for point in curve.evaluations]
    if points:
        axis.plot(*_columns(points), color=COLOURS[1], ls="none", marker="o", ms=5, label="validation loss")
    axis.set_ylim(curve.lowest, curve.highest)
    axis.set_xlim(left=0)
    axis.set(xlabel=_TOKENS, ylabel="loss, nats per token")
    axis.set_title(curve.title, loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=9.5)
    return figure


def _figure(figure_class: type, series: Sequence[Series], target: float, records: Sequence[HistoryRow]):
    """Two panels; below them, if there is something to compare, the difference and the legend."""
    compared = len(series) > 1
    legend_rows = max(0, len(series) - 8)
    figure = figure_class(figsize=(9, (5.8 if compared else 3.6) + 0.18 * legend_rows), layout="constrained")
    heights = {"height_ratios": (3, 1.7 + 0.15 * legend_rows)} if compared else {}
    axes = figure.subplots(2 if compared else 1, 2, squeeze=False, gridspec_kw=heights)
    by_tokens, by_time = axes[0]
    by_time.sharey(by_tokens)
    unit, unit_ms = time_unit(series)
    low, high, target_shown = loss_range(series, target)
    for index, one in enumerate(series):
        _draw_loss(by_tokens, one, index, lambda point: point.tokens / 1e6)
        timed = [point for point in one.curve if point.train_time_ms is not None]
        if timed:
            _draw_loss(by_time, one, index, lambda point: (point.train_time_ms or 0) / unit_ms, timed)
        if target_shown and one.tokens_to_target is not None:
            by_tokens.plot([one.tokens_to_target / 1e6], [target], "o", ms=9, mfc="none", mec=_colour(index), mew=1.5)
    for axis in (by_tokens, by_time):
        axis.set_ylim(low, high)
        axis.set_xlim(left=0)
        if target_shown:
            axis.axhline(target, color="#555555", lw=1, ls=(0, (1, 1.5)))
            axis.annotate(
                f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", color="#444444", fontsize=9, zorder=1.8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )  # fmt: skip
    _mark_records(by_tokens, records)
    by_tokens.set(xlabel=_TOKENS, ylabel="validation loss, nats per token")
    by_time.set(xlabel=f"training time ({unit})")
    if compared:
        _draw_differences(axes[1][0], series)
        axes[1][0].sharex(by_tokens)
        axes[1][1].axis("off")
    box = {"loc": "center left", "bbox_to_anchor": (0, 0.5)} if compared else {"loc": "upper right"}
    _draw_legend(axes[1][1] if compared else by_tokens, series, target, box)
    return figure


def _draw_loss(axis, one: Series, index: int, x, points: Sequence[ValidationPoint] | None = None) -> None:
    for seed in one.seeds:
        known = [point for point in seed if points is None or point.train_time_ms is not None]
        axis.plot([x(p) for p in known], [p.val_loss for p in known], color=_colour(index), lw=0.6, alpha=0.5)
    points = one.curve if points is None else points
    axis.plot([x(p) for p in points], [p.val_loss for p in points], **_line(index), markevery=max(1, len(points) // 16))


def _mark_records(axis, records: Sequence[HistoryRow]) -> None:
    for row, record in enumerate(sorted(records, key=lambda record: record.tokens)):
        at = record.tokens / 1e6
        axis.axvline(at, color="#555555", lw=1, ls=(0, (1, 1.5)))
        axis.annotate(
            f"{format_tokens(record.tokens)} {record.name}", (at, 0.98), xycoords=("data", "axes fraction"),
            xytext=(-3, -11 * row), textcoords="offset points", ha="right", va="top", color="#444444", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )  # fmt: skip
        axis.set_xlim(right=max(axis.get_xlim()[1], 1.02 * at))


def _draw_differences(axis, series: Sequence[Series]) -> None:
    axis.axhline(0, color=_colour(0), lw=1.6)
    for index, one in enumerate(series):
        for differences in one.seed_differences:
            axis.plot(*_columns(differences), color=_colour(index), lw=0.6, alpha=0.5)
        axis.plot(*_columns(one.difference), **_line(index))
    axis.set_ylim(difference_range(series))
    axis.set_title(f"loss minus that of {short_names([series[0].name], _NAME_WIDTH)[0]}", loc="left", fontsize=10)
    axis.set(xlabel=_TOKENS, ylabel="difference, nats per token")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in points], [value for _, value in points]


def _draw_legend(axis, series: Sequence[Series], target: float, box: dict) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_line(index)) for index in range(len(series))]
    names, labels = short_names([one.name for one in series], _NAME_WIDTH), []
    for name, one in zip(names, series):
        seeds = f", mean of {len(one.seeds)}" if one.seeds and one.tokens_to_target is not None else ""
        labels.append(f" {name}: {one.verdict}{seeds}")  # the space: matplotlib drops labels that begin with _
    title = f"tokens to {target:g}"
    legend = axis.legend(
        handles, labels, title=title, frameon=False, fontsize=9.5, handlelength=3.5, alignment="left", **box
    )
    legend.get_title().set_fontsize(9.5)


def _colour(index: int) -> str:
    return COLOURS[style_of(index).colour]


def _line(index: int) -> dict:
    """matplotlib's arguments for a line; it counts dashes in widths of the line."""
    width, style = 1.6, style_of(index)
    dashes = (0, tuple(length / 2 for length in style.dashes)) if style.dashes else "-"
    return {"color": _colour(index), "ls": dashes, "marker": style.marker, "ms": 3.5, "lw": width}
