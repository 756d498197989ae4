"""Shards of tokens."""

import contextlib
import os
import random
from pathlib import Path

import numpy as np

from fuzz.damage import NAMES, damaged
from senano_jax.data.shards import HEADER_BYTES, Shard, check_tokens, find_shards, open_shard, write_shard
from senano_jax.data.stream import SequenceSource
from senano_jax.errors import UserError


class Shards:
    def __init__(self, seeds: Path):
        self._seed = seeds / "shard.bin"
        write_shard(self._seed, np.arange(3000))

    def __call__(self, rng: random.Random, place: Path) -> str:
        content = bytearray(self._seed.read_bytes())
        how = rng.choice(["bytes", "header", "shrinks", "name", "link"])
        path = place / "a.bin"
        if how == "bytes":
            content = damaged(rng, content)
        elif how == "header":
            at = 4 * rng.randrange(4)
            content[at : at + 4] = rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), 20240520, 3000, 2999]).to_bytes(
                4, "little", signed=True
            )
        path.write_bytes(content)
        if how == "link":
            path = place / "link.bin"
            path.symlink_to(
                rng.choice(["/dev/zero", "/etc/passwd", "/proc/self/mem", str(path), "link.bin", "../nowhere", "/"])
            )
        if how == "name":
            path = rng.choice(NAMES)
            with contextlib.suppress(UserError):
                find_shards(str(place / path) if rng.random() < 0.5 else str(place / "*" / path))
        try:
            check_tokens(path, open_shard(path), 0)
        finally:
            tokens = Shard(path)
            if how == "shrinks":
                os.truncate(path, rng.randrange(HEADER_BYTES + 6000))
            tokens.read(0, len(tokens))
            SequenceSource([path], rng.choice([1, 128, 5000]))[0]
        return how
