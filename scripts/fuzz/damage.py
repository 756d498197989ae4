"""Ways to damage the content of a file, and values and names that nobody expects."""

import random

HUGE = (2**31 - 1, -(2**31), 2**32, 2**63 - 1, -1, 0, 10**30, 10**400, 1e308, float("nan"), float("inf"))
WRONG = (
    None,
    True,
    False,
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    [],
    [1],
    {},
    {"a": {}},
    1.5,
    *HUGE,
)
NAMES = ("../escape", "/tmp/escape", "a/../../b", "a\0b", "x" * 300, "\ud800", "-rf", "*", "**/" * 50, "~root")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut, with bits flipped, with a piece replaced, repeated or removed, or something else altogether."""
    content, at = bytearray(content), rng.randrange(max(len(content), 1))
    piece = slice(at, at + rng.choice([1, 4, 64, 1024]))
    how = rng.randrange(7)
    if how == 0:
        del content[at:]
    elif how == 1 and content:
        for _ in range(rng.choice([1, 1, 2, 30])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 2:
        content[piece] = rng.randbytes(len(content[piece]))
    elif how == 3:
        content[piece] = bytes(len(content[piece]))
    elif how == 4:
        content[at:at] = content[piece] * rng.choice([1, 50])
    elif how == 5:
        del content[piece]
    else:
        content = bytearray(
            rng.choice([b"", b"\0" * 5000, b"\xff\xfe", b"PK\x03\x04", b"\x80\x02.", rng.randbytes(2000)])
        )
    return bytes(content)


def deep(rng: random.Random) -> bytes:
    depth = rng.choice([100, 3000, 300_000])
    return rng.choice([b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])


def change(rng: random.Random, document: object) -> None:
    """Replaces, renames, adds or removes one value somewhere in a JSON document."""
    while isinstance(document, dict) and document:
        key = rng.choice(sorted(document))
        if isinstance(document[key], dict) and document[key] and rng.random() < 0.7:
            document = document[key]
            continue
        how = rng.random()
        if how < 0.8:
            document[key] = rng.choice(WRONG)
        elif how < 0.9:
            del document[key]
        else:
            document[rng.choice(["extra", "", "__class__", "../x"])] = rng.choice(WRONG)
        return
