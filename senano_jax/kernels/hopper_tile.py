"""How hopper_matmul cuts a product up among the blocks of a cluster, and what a multiprocessor has room for."""

from dataclasses import dataclass, fields
from typing import Literal

WARPGROUPS = 2  # that multiply, each for tiles of its own
THREADS = 128  # of a warpgroup
CLUSTER = 2  # blocks that share the tiles of one operand
SWIZZLE = 128  # bytes
SWIZZLED = SWIZZLE // 2  # bfloat16 numbers
WGMMA_ROWS = 64  # of one instruction; at most 256 columns
SHARED_MEMORY = 226 * 1024  # bytes of a block: 227 KiB less what the barriers take
ACCUMULATORS = 192  # of the 232 registers that a thread has: the rest is for addresses and the epilogue


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: sizes in elements of the tile that one warpgroup works on.

    Raises ValueError for sizes that the instructions or a multiprocessor do not allow.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 5  # of loads in flight
    group: int = 8  # rows of tiles that clusters go through together, so that both operands stay in the L2 cache
    shared: Literal["a", "b"] = "a"  # the operand that both blocks of a cluster multiply with
    piece: int = 128  # columns that one store writes

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 2 if field.name == "stages" else 1  # a stage is free once the next one is being multiplied
            if field.type is int and value < least:
                raise ValueError(f"{field.name} of a tile is {value}; it must be at least {least}")
        if self.shared not in ("a", "b"):
            raise ValueError(f"shared of a tile is {self.shared!r}; it must be a or b")
        if self.rows % WGMMA_ROWS:
            raise ValueError(f"rows of a tile are {self.rows}; they must be a multiple of {WGMMA_ROWS}")
        for name in ("columns", "depth", "piece"):
            if getattr(self, name) % SWIZZLED:
                raise ValueError(f"{name} of a tile is {getattr(self, name)}; it must be a multiple of {SWIZZLED}")
        if self.columns > 256:
            raise ValueError(f"columns of a tile are {self.columns}; one instruction multiplies 256 at most")
        if self.columns % self.piece:
            raise ValueError(f"columns of a tile are {self.columns}; its piece, {self.piece}, does not divide them")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"a tile takes {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")
        if self.accumulators > ACCUMULATORS:
            raise ValueError(f"a tile takes {self.accumulators} accumulators of a thread, which has {ACCUMULATORS}")

    @property
    def pieces(self) -> int:
        """Stores of a warpgroup for each tile."""
        return self.columns // self.piece

    @property
    def cluster_rows(self) -> int:
        """Rows of the result that the blocks of a cluster work on."""
        return self.rows * (CLUSTER if self.shared == "b" else 1)

    @property
    def cluster_columns(self) -> int:
        """Columns of the result that the blocks of a cluster work on."""
        return self.columns * (CLUSTER if self.shared == "a" else 1)

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: the ring of loads, and of each warpgroup the piece on its way out."""
        loads = self.stages * (self.rows + self.columns) * self.depth
        return 2 * (loads + WARPGROUPS * self.rows * self.piece)

    @property
    def accumulators(self) -> int:
        """Registers of a thread, float32."""
        return self.rows * self.columns // THREADS

    def divides(self, rows: int, depth: int, columns: int) -> bool:
        """Whether a product [rows, depth] x [depth, columns] consists of whole tiles."""
        return not (rows % self.cluster_rows or columns % self.cluster_columns or depth % self.depth)


# The faster ones first; scripts/tune_matmul.py times them and others.
TILES = (Tile(columns=192, stages=4, shared="b", piece=64), Tile())


def tile_for(rows: int, depth: int, columns: int) -> Tile | None:
    """The first of TILES that divides a product [rows, depth] x [depth, columns], if one does."""
    return next((tile for tile in TILES if tile.divides(rows, depth, columns)), None)
