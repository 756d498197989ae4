"""What a model is told: two families of it, and the checks that refuse what cannot work."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from senano_jax.data.vocabulary import VOCAB_SIZE
from senano_jax.errors import UserError, check_counts
from senano_jax.kernels import triton


@dataclass(frozen=True)
class LayerSchedule:
    """Order in which stored layers are applied: prelude once, loop `visits` times over the same weights, coda once.

    Layers are numbered in that order. `LayerSchedule(3, 6, 4, 3)` is 0,1,2,(3..8)x4,9,10,11: 12 layers, 30 positions.
    """

    prelude: int
    """Layers applied once before the loop; at least one, because the first layer's values feed all others."""
    loop: int
    """Layers of the loop; even, so that every visit meets the same windows."""
    visits: int
    """Times the loop is applied; even, because position i feeds position N-1-i through a skip."""
    coda: int
    """Layers applied once after the loop; as many as in the prelude."""
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
    def skips(self) -> int:
        """Skip connections: the second half of the positions each reads one of the first half."""
        return self.positions // 2

    @property
    def order(self) -> tuple[int, ...]:
        """The layer at each position."""
        first, end = self.prelude, self.prelude + self.loop
        return (*range(first), *(*range(first, end),) * self.visits, *range(end, self.layers))

    def has_long_window(self, layer: int) -> bool:
        return layer % 2 == 0 if self.long_windows is None else layer in self.long_windows


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What all models have, and what training and profiling ask of any."""

    sees_documents: ClassVar[bool]  # does attention end at the borders of documents?

    dim: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads; the head width is dim / num_heads."""
    mlp_expansion: int = 4
    """Hidden width of the MLP, in units of dim."""
    vocab_size: int = 50257
    """Tokens that have an embedding."""
    padded_vocab_size: int = 50304
    """Columns of the head."""
    attention: Literal["auto", "flash", "banded", "dense"] = field(default="auto", metadata={"free": True})
    """Implementation of attention; auto takes the fastest one for the device."""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass recomputes: nothing; each layer except its attention; each layer. Recomputed layers take a
    residual stream that is rounded to the activations' type, so bfloat16 losses differ in the fourth digit."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def positions(self) -> int:
        """Layer applications in one forward pass."""
        raise NotImplementedError

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: does it see the long window?"""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """modded-nanogpt's transformer and what became of it: skips over depth, rotary positions, soft-capped logits."""

    sees_documents = True

    layers: LayerSchedule
    """Order of the layers."""
    value_embeddings: int = 0
    """Tables of values by token, mixed into the attention of as many layers at the start and again, in the same order,
    at the end. 0: every layer mixes in the values of the first one instead."""
    unroll: bool = field(default=False, metadata={"free": True})
    """Unroll the scan over the loop's visits in the compiled program: faster on a GPU, slower to compile. The demo
    alone leaves it, to compile sooner."""

    def value_table(self, layer: int) -> int | None:
        """The value embedding that a layer mixes in, if any."""
        from_end = layer - (self.layers.layers - self.value_embeddings)
        return next((table for table in (layer, from_end) if 0 <= table < self.value_embeddings), None)

    @property
    def positions(self) -> int:
        return self.layers.positions

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        layers = self.layers
        return tuple(layers.has_long_window(n) for n in layers.order if n not in layers.no_attention)


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(TransformerConfig):
    """GPT-2: learned positions, layer norms and biases, GELU, and one table for the embedding and the head."""

    sees_documents = False

    num_layers: int
    """Layers, each applied once."""
    max_length: int = 1024
    """Positions that have an embedding: the longest sequence."""

    @property
    def positions(self) -> int:
        return self.num_layers

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        return (True,) * self.num_layers


def check_model(model: ModelConfig | Gpt2Config) -> None:
    """Raises UserError at the first value that cannot work."""
    counts = {
        "--model.dim": model.dim,
        "--model.num-heads": model.num_heads,
        "--model.mlp-expansion": model.mlp_expansion,
        "--model.vocab-size": model.vocab_size,
    }
    if isinstance(model, Gpt2Config):
        counts |= {"--model.num-layers": model.num_layers, "--model.max-length": model.max_length}
    else:
        counts["--model.layers.prelude"] = model.layers.prelude
    check_counts(counts, least=1)
    if model.dim % model.num_heads:
        raise UserError(
            f"--model.dim {model.dim} is not divisible by --model.num-heads {model.num_heads}; "
            "choose a width that is a multiple of the number of heads"
        )
    if isinstance(model, ModelConfig) and model.head_dim % 4:
        raise UserError(
            f"--model.dim {model.dim} with --model.num-heads {model.num_heads} gives heads of {model.head_dim}; "
            "the rotary embedding needs a multiple of 4"
        )
    if model.attention == "flash" and not triton.fits(model.head_dim):
        raise UserError(
            f"--model.attention flash takes heads whose width is a power of two from 16 up, not {model.head_dim} "
            "(--model.dim / --model.num-heads); change these, or use --model.attention banded"
        )
    if not VOCAB_SIZE <= model.vocab_size <= model.padded_vocab_size:
        raise UserError(
            f"--model.padded-vocab-size {model.padded_vocab_size} is below --model.vocab-size {model.vocab_size}, or "
            f"both are below {VOCAB_SIZE}, the tokens of GPT-2 that shards hold; use at least that"
        )
    if isinstance(model, ModelConfig):
        _check_schedule(model)


def _check_schedule(model: ModelConfig) -> None:
    layers = model.layers
    check_counts(
        {
            "--model.layers.loop": layers.loop,
            "--model.layers.visits": layers.visits,
            "--model.value-embeddings": model.value_embeddings,
        },
        least=0,
    )
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
    for flag, named in {
        "--model.layers.long-windows": layers.long_windows or (),
        "--model.layers.no-attention": layers.no_attention,
    }.items():
        if unknown := [n for n in named if not 0 <= n < layers.layers]:
            raise UserError(f"{flag} names layer {unknown[0]}; there are layers 0 to {layers.layers - 1}")
    if model.value_embeddings > layers.prelude:
        raise UserError(
            f"--model.value-embeddings {model.value_embeddings} is more than --model.layers.prelude {layers.prelude}; "
            "use at most one table for each layer before the loop"
        )
    if not model.value_embeddings and 0 in layers.no_attention:
        raise UserError(
            "--model.layers.no-attention names layer 0, whose values all layers mix in; leave it out, or use "
            "--model.value-embeddings"
        )
