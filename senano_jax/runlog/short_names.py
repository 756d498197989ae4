"""Names that fit a column, or a legend, and still differ."""

from collections.abc import Sequence

LEAST_WIDTH = 12


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Each name in at most `width` characters, LEAST_WIDTH or more; different names stay different.

    What is cut out of a long name is its middle; of names that would be alike, the part that they share; what is alike
    even so is numbered.
    """
    cut = {name: _cut(name, width, width // 2) for name in names}
    for alike in _alike(cut):
        tails = sorted(range(2, width - 3), key=lambda tail: abs(tail - width // 2))
        ways = [[_cut(name, width, tail) for name in alike] for tail in tails]
        ways.append([_around_difference(name, alike, width) for name in alike])
        cut |= dict(zip(alike, max(ways, key=lambda way: len(set(way)))))
    numbered = [name for alike in _alike(cut) for name in alike]
    room = width - len(str(len(numbered))) - 2
    cut |= {name: f"{_cut(name, room, 4)} #{number}" for number, name in enumerate(numbered, start=1)}
    return [cut[name] for name in names]


def _alike(cut: dict[str, str]) -> list[list[str]]:
    """The names that have been cut to one, where there are several."""
    places: dict[str, list[str]] = {}
    for name, short in cut.items():
        places.setdefault(short, []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _cut(name: str, width: int, tail: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _around_difference(name: str, names: Sequence[str], width: int) -> str:
    """The beginning, what follows where the name first parts from the one most like it, and the end."""
    if len(name) <= width:
        return name
    parting = max((_common_prefix(name, other) for other in names if other != name), default=0)
    part = (width - 2) // 3
    begin = min(max(parting - 1, part), len(name) - part)
    head, tail = name[: width - 2 - 2 * part], name[-part:]
    middle = name[begin : min(begin + part, len(name) - part)]
    return f"{head}…{middle}…{tail}"


def _common_prefix(one: str, other: str) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
