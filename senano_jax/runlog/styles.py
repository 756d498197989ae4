"""How the lines of many runs stay apart: by colour, by dashes and by markers, each of which is enough for a few runs.

The k-th run of a comparison, from 0, has colour k mod 6, dashes k mod 5 and marker k mod 7. As these counts have no
common factor, the first 30 runs differ in colour or dashes, and 210 with their markers. The order of the colours is
blue, vermilion, green, black (white on a dark page), purple, sky blue: Okabe and Ito's, without the yellow and the
orange, which are too light for white paper, and darkened where they were. Each has a contrast of 3 : 1 or more with its
page, and any two of them a colour difference (CIE 1976) of 12 or more, for eyes without red, green or blue cones too.
"""

from typing import NamedTuple

COLOURS = ("#0063A8", "#D55E00", "#00926A", "#000000", "#C4609C", "#3A9BDC")
DARK_COLOURS = ("#2E8FD0", "#EE6C1E", "#12A97C", "#FFFFFF", "#D77FB4", "#8FD3FA")
DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (7, 2, 2, 2), (2, 2), (12, 2, 2, 2, 2, 2))
"""On and off, in points of a line of width 2; none for a solid line."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""In matplotlib's spelling: circle, square, triangle, diamond, triangle on its tip, plus, cross."""


class Style(NamedTuple):
    """How the line of a run is drawn."""

    colour: int
    """Index into COLOURS and DARK_COLOURS."""
    dashes: tuple[float, ...]
    marker: str


def style_of(index: int) -> Style:
    """How the run at this place of a comparison is drawn."""
    return Style(index % len(COLOURS), DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])
