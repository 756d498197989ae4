"""How hopper_matmul cuts a product up among the warpgroups of a cluster, and what a multiprocessor has room for."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Form = Literal["ping-pong", "cooperative", "overlapped"]
WARPGROUPS = 2  # that multiply
THREADS = 128  # of a warpgroup
CLUSTER = 2  # blocks that share the tiles of one operand
SWIZZLE = 128  # bytes
SWIZZLED = SWIZZLE // 2  # bfloat16 numbers
WGMMA_ROWS = 64  # of one instruction; at most 256 columns
SHARED_MEMORY = 226 * 1024  # bytes of a block: 227 KiB less what the barriers take
VALUE_REGISTERS = 192  # of the 232 that a thread has: the rest is for addresses and the epilogue


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: sizes in elements of the tile that one block works on.

    `ping-pong`: each warpgroup has tiles of its own; one multiplies while the other applies the epilogue and stores.
    `cooperative`: each has half of the rows of the same tile, so that what is loaded serves more products; the epilogue
    runs while nothing multiplies. `overlapped`: the same, but a tile waits in registers, as bfloat16, and its epilogue
    goes piece by piece between the next tile's products. With a `lead` the two do not turn to the next tile at once.

    Raises ValueError for sizes that the instructions or a multiprocessor do not allow.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 5  # of loads in flight
    group: int = 8  # rows of tiles that clusters go through together, so that both operands stay in the L2 cache
    form: Form = "ping-pong"
    shared: Literal["a", "b"] = "a"  # the operand that both blocks of a cluster multiply with
    piece: int = 128  # columns that one store writes
    buffers: int = 1  # pieces of a warpgroup in shared memory
    lead: int = 0  # products by which one of the two warpgroups on a tile is ahead of the other

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "lead" else 1
            if field.type is int and value < least:
                raise ValueError(f"{field.name} of a tile is {value}; it must be at least {least}")
        forms = get_args(Form)
        if self.form not in forms:
            raise ValueError(f"form of a tile is {self.form!r}; it must be one of {', '.join(forms)}")
        if self.shared not in ("a", "b"):
            raise ValueError(f"shared of a tile is {self.shared!r}; it must be a or b")
        multiple = WGMMA_ROWS * (1 if self.form == "ping-pong" else WARPGROUPS)
        if self.rows % multiple:
            raise ValueError(f"rows of a tile are {self.rows}; {self.form} needs a multiple of {multiple}")
        for name in ("columns", "depth", "piece"):
            if getattr(self, name) % SWIZZLED:
                raise ValueError(f"{name} of a tile is {getattr(self, name)}; it must be a multiple of {SWIZZLED}")
        if self.columns > 256:
            raise ValueError(f"columns of a tile are {self.columns}; one instruction multiplies 256 at most")
        if self.columns % (self.piece * self.buffers):
            raise ValueError(
                f"columns of a tile are {self.columns}; they must be a multiple of {self.buffers} x {self.piece}"
            )
        most = 0 if self.form == "ping-pong" else self.stages - 1
        if self.lead > most:
            raise ValueError(
                f"lead of a tile is {self.lead}; {self.form} with {self.stages} stages takes {most} at most"
            )
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"a tile takes {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")
        if self.value_registers > VALUE_REGISTERS:
            raise ValueError(
                f"a tile takes {self.value_registers} registers of a thread for its values; there are {VALUE_REGISTERS}"
            )

    @property
    def own_rows(self) -> int:
        """Rows of the tile that one warpgroup multiplies."""
        return self.rows if self.form == "ping-pong" else self.rows // WARPGROUPS

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
        """Bytes of a block: the ring of loads and the pieces on their way out."""
        loads = self.stages * (self.rows + self.columns) * self.depth
        return 2 * (loads + WARPGROUPS * self.buffers * self.own_rows * self.piece)

    @property
    def value_registers(self) -> int:
        """Of a thread: float32 accumulators, and in the overlapped form the tile before in bfloat16."""
        accumulators = self.own_rows * self.columns // THREADS
        return accumulators * 3 // 2 if self.form == "overlapped" else accumulators

    def divides(self, rows: int, depth: int, columns: int) -> bool:
        """Whether a product [rows, depth] x [depth, columns] consists of whole tiles, of enough steps for the form."""
        steps = 2 * self.pieces if self.form == "overlapped" else 1
        return (
            rows % self.cluster_rows == 0
            and columns % self.cluster_columns == 0
            and depth % self.depth == 0
            and depth >= steps * self.depth
        )


DEFAULT_TILE = Tile()  # scripts/tune_matmul.py times others
