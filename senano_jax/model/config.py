"""What a model is told: two families of it, and the checks that refuse what cannot work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from senano_jax.data.vocabulary import VOCAB_SIZE
from senano_jax.errors import UserError, check_counts
from senano_jax.kernels import triton_sizes
from senano_jax.model.schedule import LayerSchedule, UNet, Weighted
from senano_jax.model.soft_cap import SoftCap

GATE_INPUTS = 12  # channels of its input that a gate reads, the first ones


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
    attention: Literal["auto", "hopper", "flash", "banded", "dense"] = field(default="auto", metadata={"free": True})
    """Implementation of attention; auto takes the fastest one that the device runs at these widths."""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass recomputes: nothing; each layer except its attention; each layer. Recomputed layers take a
    residual stream that is rounded to the activations' type, so bfloat16 losses differ in the fourth digit."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def positions(self) -> int:
        """Layer applications in one forward pass."""
        raise NotImplementedError

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: does it see the long window?"""
        raise NotImplementedError

    @property
    def attention_pairs(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: do its heads attend in pairs?"""
        return (False,) * len(self.attention_windows)

    @property
    def attention_differences(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: is a second one taken from it?"""
        return (False,) * len(self.attention_windows)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """modded-nanogpt's transformer and what became of it: rotary positions, values from the first layer or by token,
    soft-capped logits."""

    sees_documents = True

    layers: LayerSchedule
    """Order of the layers."""
    value_embeddings: int = 0
    """Tables of values by token, mixed into the attention of as many layers at the start and again, in the same order,
    at the end. 0: every layer mixes in the values of the first one instead."""
    unroll: bool = field(default=False, metadata={"free": True})
    """Unroll the scan over the loop's visits in the compiled program: faster on a GPU, slower to compile. The demo
    leaves it, to compile sooner."""
    trunk: UNet | Weighted = field(default_factory=UNet)
    """How the residual stream runs through the layers."""
    mlp_widths: tuple[tuple[int, int], ...] = ()
    """Layers whose MLP has another hidden width than the others: pairs of a layer and its width."""
    cap: SoftCap = field(default_factory=SoftCap)
    """From the head's products to logits."""
    tied: bool = False
    """The columns of the head are the tokens' embeddings too: one table, which the head's rule updates."""
    head_gate: bool = False
    """Multiply what each attention head gives by a gate between 0 and 1 that the layer's input opens, with weights of
    its own for each visit."""
    exclusive_attention: bool = False
    """Take from what each attention head gives a learned share of its part along the token's own value, before the
    gate; a share for each head and visit, none at the start. Not in layers with paired heads."""
    key_offset: Literal["none", "long", "all"] = "none"
    """Layers whose keys have the token before in the half of their dimensions that carries no position: none, those
    that attend over the long window, or all; never those with paired heads. It reaches across the start of a document,
    by this one token."""
    difference: tuple[int, ...] = ()
    """Layers that take from what each attention head gives that of a second one, times a share that the layer's input
    sets, with weights of its own for each visit. The second one has queries of its own and the first one's keys and
    values: dim x dim more parameters a layer."""
    paired_heads: tuple[int, ...] = ()
    """Layers whose heads attend in pairs: each sees the keys of both, over half as many tokens as the window has."""

    def mlp_width(self, layer: int) -> int:
        """Hidden units of a layer's MLP."""
        return dict(self.mlp_widths).get(layer, self.mlp_expansion * self.dim)

    def offsets_keys(self, layer: int) -> bool:
        """Whether a layer's keys have the token before in some of their dimensions."""
        chosen = self.key_offset == "all" or (self.key_offset == "long" and self.layers.has_long_window(layer))
        return chosen and layer not in self.paired_heads

    def excludes_own_values(self, layer: int) -> bool:
        """Whether a layer's attention is exclusive."""
        return self.exclusive_attention and layer not in self.paired_heads

    @property
    def has_parameters_by_visit(self) -> bool:
        """Whether layers of the loop have parameters that differ from visit to visit."""
        pieces = self.head_gate or self.exclusive_attention or bool(self.difference)
        return pieces or isinstance(self.trunk, Weighted)

    def value_table(self, layer: int) -> int | None:
        """The value embedding that a layer mixes in, if any."""
        from_end = layer - (self.layers.layers - self.value_embeddings)
        return next((table for table in (layer, from_end) if 0 <= table < self.value_embeddings), None)

    @property
    def positions(self) -> int:
        """Applications of layers in one forward pass."""
        return self.layers.positions

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: does it see the long window?"""
        return self._of_attentions(self.layers.has_long_window)

    @property
    def attention_pairs(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: does it pair its heads?"""
        return self._of_attentions(self.paired_heads.__contains__)

    @property
    def attention_differences(self) -> tuple[bool, ...]:
        """For each attention of one forward pass: is a second one taken from it?"""
        return self._of_attentions(self.difference.__contains__)

    def _of_attentions(self, holds: Callable[[int], bool]) -> tuple[bool, ...]:
        """For each attention of one forward pass, whether it `holds` of its layer."""
        return tuple(holds(n) for n in self.layers.order if n not in self.layers.no_attention)


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
        """Applications of layers in one forward pass."""
        return self.num_layers

    @property
    def attention_windows(self) -> tuple[bool, ...]:
        """All see the long window."""
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
    if model.attention == "flash" and not triton_sizes.fits(model.head_dim):
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
        check_counts({"--model.mlp-widths": min((width for _, width in model.mlp_widths), default=1)}, least=1)
        model.cap.check("--model.cap")
        for name in ("head_gate", "difference"):
            if getattr(model, name) and model.dim < GATE_INPUTS:
                flag = "--model." + name.replace("_", "-")
                raise UserError(f"{flag} reads {GATE_INPUTS} channels, --model.dim is {model.dim}; widen it")


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
    model.trunk.check(layers)
    for flag, named in {
        "--model.layers.long-windows": layers.long_windows or (),
        "--model.layers.no-attention": layers.no_attention,
        "--model.paired-heads": model.paired_heads,
        "--model.difference": model.difference,
        "--model.mlp-widths": tuple(layer for layer, _ in model.mlp_widths),
    }.items():
        if unknown := [n for n in named if not 0 <= n < layers.layers]:
            raise UserError(f"{flag} names layer {unknown[0]}; there are layers 0 to {layers.layers - 1}")
    for flag, named in {"--model.paired-heads": model.paired_heads, "--model.difference": model.difference}.items():
        if without := [n for n in named if n in layers.no_attention]:
            raise UserError(f"{flag} names layer {without[0]}, which has no attention; leave it out")
    if model.paired_heads and model.num_heads % 2:
        raise UserError(
            f"--model.paired-heads takes an even number of heads, --model.num-heads is {model.num_heads}; "
            "change it, or leave all layers out"
        )
    if both := [n for n in model.difference if n in model.paired_heads]:
        raise UserError(
            f"--model.difference and --model.paired-heads name layer {both[0]}; leave it out of one of them"
        )
    if model.difference and model.value_embeddings:
        raise UserError("--model.difference does not go with --model.value-embeddings; leave out one of them")
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
