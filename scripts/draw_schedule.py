"""Draws the layer schedule of the recurrent system: docs/schedule.svg, the picture in the README."""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import Arc, FancyBboxPatch

from senano_jax.config import LayerSchedule
from senano_jax.errors import one_line_errors
from senano_jax.model.schedule import UNet
from senano_jax.presets import preset

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "schedule"  # the same bytes from every run
COLORS = {"prelude": "#0072B2", "loop": "#E69F00", "coda": "#009E73"}  # Okabe and Ito: safe for colour-blind readers


def layer_at(position: int, layers: LayerSchedule) -> tuple[int, str]:
    """Stored layer and part of the schedule at a position."""
    if position < layers.prelude:
        return position, "prelude"
    inside = position - layers.prelude
    if inside < layers.loop * layers.visits:
        return layers.prelude + inside % layers.loop, "loop"
    return position - layers.loop * (layers.visits - 1), "coda"


def draw(layers: LayerSchedule, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 3.4))
    for position in range(layers.positions):
        layer, part = layer_at(position, layers)
        long_window = position % 2 == 0
        box = FancyBboxPatch(
            (position - 0.4, 0),
            0.8,
            1.1 if long_window else 0.75,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=COLORS[part],
            edgecolor="none",
        )
        axes.add_patch(box)
        axes.text(position, 0.36, str(layer), ha="center", va="center", color="white", fontsize=10, weight="bold")
    for position in range(UNet().skips(layers)):
        other = layers.positions - 1 - position
        width = other - position
        axes.add_patch(
            Arc(((position + other) / 2, 1.2), width, 0.36 * width**0.75, theta1=0, theta2=180, color="#888", lw=0.9)
        )
    for visit in range(layers.visits):
        start = layers.prelude + visit * layers.loop - 0.4
        end = start + layers.loop - 0.2
        axes.plot([start, end], [-0.18, -0.18], color=COLORS["loop"], lw=2, solid_capstyle="butt")
        axes.text((start + end) / 2, -0.3, f"visit {visit + 1}", ha="center", va="top", fontsize=9, color="#555")
    axes.text(layers.prelude / 2 - 0.5, -0.3, "prelude", ha="center", va="top", fontsize=9, color="#555")
    last = layers.positions - layers.coda / 2 - 0.5
    axes.text(last, -0.3, "coda", ha="center", va="top", fontsize=9, color="#555")
    axes.set_xlim(-0.8, layers.positions - 0.2)
    axes.set_ylim(-0.8, 3.6)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", transparent=False, metadata={"Date": None})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    out = Path(__file__).parent.parent / "docs" / "schedule.svg"
    with one_line_errors(prints_result=False):
        draw(preset("recurrent").model.layers, out)
        print(out)
