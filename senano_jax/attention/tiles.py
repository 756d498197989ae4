"""Tile sizes of the flash attention kernels: the only place to touch after running scripts/tune_attention.py."""

from dataclasses import dataclass

import jax.numpy as jnp

from senano_jax.attention.intervals import BLOCK


@dataclass(frozen=True)
class Tile:
    """One kernel's share of the score matrix and how Triton compiles it."""

    queries: int  # rows of the score matrix a step works on
    keys: int  # columns
    warps: int  # of 32 threads; 4 or 8, one or two warpgroups on Hopper
    stages: int  # depth of the software pipeline that loads the next tiles

    def __post_init__(self):
        assert BLOCK % self.queries == 0 and BLOCK % self.keys == 0, "tiles must divide every length we accept"


@dataclass(frozen=True)
class Tiles:
    """The three kernels: forward and dQ loop over key tiles, dK/dV loops over query tiles."""

    forward: Tile
    dq: Tile
    dkv: Tile


# Measured on an H200 with JAX 0.11.2 at windows of 1, 7 and 14 blocks over documents of text. Four warps and 64 rows
# let two programs share a multiprocessor, one computing while the other waits; larger tiles read less but run alone.
BFLOAT16 = Tiles(
    forward=Tile(queries=64, keys=64, warps=4, stages=3),
    dq=Tile(queries=64, keys=64, warps=4, stages=2),
    dkv=Tile(queries=64, keys=64, warps=4, stages=2),
)
# Float32 serves tests: true float32 products have no tensor cores, and larger tiles do not fit in registers.
FLOAT32 = Tiles(*[Tile(queries=32, keys=32, warps=8, stages=1)] * 3)


def default_tiles(dtype: jnp.dtype) -> Tiles:
    """What was fastest on an H200 for tensors of this type."""
    return BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32
