"""In which order layers are applied, and how the residual stream runs through them: what the configuration says of it.

The modules are in trunks/. An application of a layer is one of its visits if it is in the loop, else its only one.
"""

from dataclasses import dataclass

from senano_jax.errors import UserError, check_counts


@dataclass(frozen=True)
class LayerSchedule:
    """Order in which stored layers are applied: prelude once, loop `visits` times over the same weights, coda once.

    Layers are numbered in that order. `LayerSchedule(3, 6, 4, 3)` is 0,1,2,(3..8)x4,9,10,11: 12 layers, 30 positions.
    """

    prelude: int
    """Layers applied once before the loop; at least one, because the first layer's values feed all others."""
    loop: int
    """Layers of the loop."""
    visits: int
    """Times the loop is applied."""
    coda: int
    """Layers applied once after the loop."""
    long_windows: tuple[int, ...] | None = None
    """Layers that attend over the long window, the others over half of it; by default those of even number."""
    no_attention: tuple[int, ...] = ()
    """Layers that are an MLP alone."""

    @property
    def layers(self) -> int:
        """Stored layers."""
        return self.prelude + self.loop + self.coda

    @property
    def positions(self) -> int:
        """Layer applications in one forward pass."""
        return self.prelude + self.loop * self.visits + self.coda

    @property
    def order(self) -> tuple[int, ...]:
        """The layer at each position."""
        first, end = self.prelude, self.prelude + self.loop
        return (*range(first), *(*range(first, end),) * self.visits, *range(end, self.layers))

    def in_loop(self, layer: int) -> bool:
        """Whether a layer is one of the loop's."""
        return self.prelude <= layer < self.prelude + self.loop

    def visits_of(self, layer: int) -> int:
        """Times that a layer is applied."""
        return self.visits if self.in_loop(layer) else 1

    def has_long_window(self, layer: int) -> bool:
        """Whether a layer attends over the long window."""
        return layer % 2 == 0 if self.long_windows is None else layer in self.long_windows


@dataclass(frozen=True)
class UNet:
    """Skip connections over depth: of N applications, what number i < N/2 gives is added again before number N-1-i."""

    def skips(self, layers: LayerSchedule) -> int:
        """Skip connections: each application of the second half reads one of the first half."""
        return layers.positions // 2

    def check(self, layers: LayerSchedule) -> None:
        """Raises UserError for a schedule whose two halves do not pair."""
        if layers.prelude != layers.coda:
            raise UserError(
                f"--model.layers.prelude {layers.prelude} differs from --model.layers.coda {layers.coda}; "
                "skips pair the positions of the two halves, so they must be equal"
            )
        if layers.loop and (layers.loop % 2 or layers.visits % 2 or layers.visits < 2):
            raise UserError(
                f"--model.layers.loop {layers.loop} and --model.layers.visits {layers.visits} must both be even: "
                "windows alternate by position and skips pair the two halves of the visits"
            )


@dataclass(frozen=True)
class Weighted:
    """No skip connections: each application has its own weights of the stream, of what its sublayers add and of the
    embedding. Sublayers of the loop begin with the weight visits^(-1/2), the others with 1."""

    growth: float = 2.85
    """Product of all weights of the stream at the start, those of both sublayers of every application."""
    depth_block: int | None = None
    """Layers of a visit that make a block of attention over depth: each application reads the embedding, the blocks
    before its own and what its own has added so far, with weights that each token computes. The layers before the loop
    are a block, too, and those after it. None: it reads what the one before it made."""

    def complete_blocks(self, layers: LayerSchedule, visits: int) -> int:
        """What the head reads of attention over depth, but for the block of the layers after the loop: the embedding,
        the layers before the loop, and the blocks of so many visits."""
        return 2 + visits * layers.loop // self.depth_block

    def check(self, layers: LayerSchedule) -> None:
        """Raises UserError at the first value that cannot work."""
        check_counts({"--model.layers.coda": layers.coda}, least=0)
        if layers.loop:
            check_counts({"--model.layers.visits": layers.visits}, least=1)
        if not 0 < self.growth < float("inf"):
            raise UserError(f"--model.trunk.growth is {self.growth}; use a number above 0")
        if self.depth_block is None:
            return
        check_counts({"--model.trunk.depth-block": self.depth_block}, least=1)
        if not layers.loop:
            raise UserError(
                f"--model.trunk.depth-block {self.depth_block} needs a loop, --model.layers.loop is 0; leave it out"
            )
        if layers.loop % self.depth_block:
            raise UserError(
                f"--model.trunk.depth-block {self.depth_block} does not divide the {layers.loop} layers of "
                "--model.layers.loop; choose a number that does"
            )
