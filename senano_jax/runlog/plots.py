"""The comparison as a picture: loss against tokens and time, and below it the difference to the first run."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from senano_jax.errors import UserError
from senano_jax.runlog.comparison import Group, complete_runs
from senano_jax.runlog.curves import ValidationPoint, difference_curve, mean_curve, tokens_to_loss
from senano_jax.runlog.units import format_tokens

# Okabe and Ito's colours without the yellow, which white paper swallows. With the dashes and the markers, whose counts
# have no common factor with theirs, two systems stay apart in black and white too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
HOURS, MINUTES = 3_600_000, 60_000  # milliseconds
_EARLY = 0.15  # part of a run whose losses, of several nats, do not stretch the axis


@dataclass(frozen=True)
class Series:
    """What is drawn of one group."""

    name: str
    curve: list[ValidationPoint]
    """Mean over the seeds."""
    seeds: list[list[ValidationPoint]]
    """The single runs, where there are several."""
    difference: list[tuple[int, float]]
    """(tokens, loss - the first group's mean loss); none for the first group itself."""
    seed_differences: list[list[tuple[int, float]]]
    """The same of the single runs."""
    tokens_to_target: float | None
    """Mean over the seeds; None unless all reached it."""


def series_of(groups: Sequence[Group], target: float) -> list[Series]:
    """What to draw, a series a group, in order."""
    base, series = None, []
    for group in groups:
        runs = complete_runs(group)
        curve = mean_curve(runs)
        seeds = [[point for point in run.points if point.tokens > 0] for run in runs] if len(runs) > 1 else []
        difference = [] if base is None else difference_curve(curve, base)
        base = curve if base is None else base
        seed_differences = [difference_curve(seed, base) for seed in seeds]
        reached = [tokens_to_loss(run.points, target) for run in runs]
        unknown = None in reached or any(run.diverged for run in runs)
        to_target = None if unknown else sum(reached) / len(reached)
        series.append(Series(group.name, curve, seeds, difference, seed_differences, to_target))
    return series


def loss_range(series: Sequence[Series], target: float) -> tuple[float, float, bool]:
    """(lowest, highest, whether the target is among them) for the loss axis.

    The first steps of a run and a target far from all curves would flatten what there is to see.
    """
    late = [p.val_loss for s in series for p in s.curve if p.tokens >= _EARLY * s.curve[-1].tokens]
    low, high = (min(late), max(late)) if late else (target, target)
    span = max(high - low, 0.02)
    shown = low - span / 2 <= target <= high + span / 2
    if shown:
        low, high = min(low, target), max(high, target)
    return low - 0.05 * span, high + 0.05 * span, shown


def difference_range(series: Sequence[Series]) -> tuple[float, float]:
    """(lowest, highest) for the axis of the differences, scaled like the loss axis by what comes after the start."""
    drawn = [differences for one in series for differences in (one.difference, *one.seed_differences) if differences]
    late = [d for differences in drawn for tokens, d in differences if tokens >= _EARLY * differences[-1][0]]
    low, high = min(0, *late, 0), max(0, *late, 0)
    margin = 0.12 * max(high - low, 0.002)
    return low - margin, high + margin


def time_unit(series: Sequence[Series]) -> tuple[str, float]:
    """The unit of the time axis, by the longest run, and its milliseconds."""
    longest = max((point.train_time_ms or 0 for s in series for point in s.curve), default=0)
    return ("hours", HOURS) if longest > 3 * HOURS else ("minutes", MINUTES)


def plot_image(groups: Sequence[Group], target: float, image_format: str) -> bytes:
    """The picture as a "png" or "svg" file. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib; run pip install 'senano-jax[plot]'") from None
    style = {
        "text.parse_math": False,  # a $ in a name is a $
        "svg.hashsalt": "senano_jax",  # the same runs give the same file
        "font.size": 10,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    series = series_of(groups, target)
    with matplotlib.rc_context(style):
        figure = _figure(Figure, series, target)
        content = io.BytesIO()
        metadata = {"Date": None} if image_format == "svg" else {}
        figure.savefig(content, format=image_format, dpi=200, facecolor="white", metadata=metadata)
    return content.getvalue()


def _figure(figure_class: type, series: Sequence[Series], target: float):
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
            by_tokens.plot(
                [one.tokens_to_target / 1e6],
                [target],
                "o",
                ms=9,
                mfc="none",
                mec=COLOURS[index % len(COLOURS)],
                mew=1.5,
            )
    for axis in (by_tokens, by_time):
        axis.set_ylim(low, high)
        axis.set_xlim(left=0)
        if target_shown:
            axis.axhline(target, color="#555555", lw=1, ls=(0, (1, 1.5)))
            axis.annotate(
                f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", color="#444444", fontsize=9,
            )  # fmt: skip
    by_tokens.set(xlabel="tokens trained on (millions)", ylabel="validation loss (nats/token)")
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
        axis.plot(
            [x(p) for p in known], [p.val_loss for p in known], color=COLOURS[index % len(COLOURS)], lw=0.6, alpha=0.5
        )
    points = one.curve if points is None else points
    axis.plot(
        [x(p) for p in points], [p.val_loss for p in points], **_style(index), markevery=max(1, len(points) // 16)
    )


def _draw_differences(axis, series: Sequence[Series]) -> None:
    axis.axhline(0, color=COLOURS[0], lw=1.6)
    for index, one in enumerate(series):
        for differences in one.seed_differences:
            axis.plot(*_columns(differences), color=COLOURS[index % len(COLOURS)], lw=0.6, alpha=0.5)
        axis.plot(*_columns(one.difference), **_style(index))
    axis.set_ylim(difference_range(series))
    axis.set_title(f"loss minus that of {_short(series[0].name)}", loc="left", fontsize=10)
    axis.set(xlabel="tokens trained on (millions)", ylabel="difference")


def _columns(differences: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in differences], [difference for _, difference in differences]


def _draw_legend(axis, series: Sequence[Series], target: float, box: dict) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_style(index)) for index in range(len(series))]
    labels = []
    for one in series:
        reached = "not reached" if one.tokens_to_target is None else format_tokens(one.tokens_to_target, 1)
        seeds = f", mean of {len(one.seeds)}" if one.seeds else ""
        labels.append(f" {_short(one.name)}: {reached}{seeds}")  # the space: matplotlib drops labels that begin with _
    title = f"tokens to {target:g}"
    legend = axis.legend(
        handles, labels, title=title, frameon=False, fontsize=9.5, handlelength=3, alignment="left", **box
    )
    legend.get_title().set_fontsize(9.5)


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:33] + "…"


def _style(index: int) -> dict:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 3.5,
        "lw": 1.6,
    }
