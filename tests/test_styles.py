"""Lines of many runs: different ones, and colours that everybody can tell from each other and from the page."""

import itertools

import numpy as np
import pytest

from senano_jax.runlog.styles import COLOURS, DARK_COLOURS, style_of

# Linear RGB as eyes without one kind of cones see it (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
PAGES = [(COLOURS, "#ffffff"), (DARK_COLOURS, "#171717")]


def linear(colour):
    channels = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x, y, z = XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_210_runs_are_drawn_differently_and_30_without_markers():
    styles = [style_of(index) for index in range(210)]
    assert len(set(styles)) == 210
    assert len({style[:2] for style in styles[:30]}) == 30


@pytest.mark.parametrize(("colours", "page"), PAGES)
def test_colours_stand_out_from_the_page(colours, page):
    for colour in colours:
        light, dark = sorted((linear(c) @ XYZ[1] + 0.05 for c in (colour, page)), reverse=True)
        assert light / dark >= 3, colour


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(("colours", "page"), PAGES)
def test_colours_differ_for_every_eye(colours, page, vision):
    seen = {colour: lab(np.asarray(VISION[vision]) @ linear(colour)) for colour in colours}
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 12, (one, other)
