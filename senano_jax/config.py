"""Everything a run can be told, as frozen dataclasses, and the checks that refuse what cannot work.

The field docstrings are the texts of `--help`. What distinguishes one system from another is in presets.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from senano_jax.attention import BLOCK, pallas_triton
from senano_jax.data.shards import VOCAB_SIZE
from senano_jax.errors import UserError


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


@dataclass(frozen=True)
class ModelConfig:
    dim: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads; the head width is dim / num_heads."""
    layers: LayerSchedule
    """Order of the layers."""
    mlp_expansion: int = 4
    """Hidden width of the MLP, in units of dim."""
    vocab_size: int = 50257
    """Rows of the embedding."""
    padded_vocab_size: int = 50304
    """Columns of the head; the softmax runs over all of them."""
    attention: Literal["auto", "flash", "banded", "dense"] = "auto"
    """Implementation of attention; auto takes the fastest one for the device."""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass recomputes: nothing; each block except its attention; each block."""
    unroll: bool = False
    """Unroll the scan over the loop's visits in the compiled program: faster on a GPU, slower to compile."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class DataConfig:
    train_files: str
    """Glob of the training shards, read in the order of their names."""
    val_files: str
    """Glob of the validation shards."""
    val_tokens: int
    """Tokens of the validation stream that count, from its start."""
    val_seq_len: int
    """Tokens of one validation sequence."""
    discard_micro_batch: int = 0
    """Tokens skipped after every step, to replay the order of the PyTorch loader."""


@dataclass(frozen=True)
class OptimizerConfig:
    muon_lr: float
    """Muon's learning rate, for the matrices of the blocks."""
    head_lr: float
    """Adam's learning rate for the output head."""
    embed_lr: float
    """Adam's learning rate for the embedding."""
    scalar_lr: float
    """Adam's learning rate for the scalars: lambdas, value-residual and skip weights."""
    adam_b1: float
    """Adam's decay of the first moment."""
    adam_b2: float
    """Adam's decay of the second moment."""
    adam_eps: float
    """Adam's epsilon, outside the root; gradients are sums over the tokens of a step, never means."""
    momentum_start: float
    """Muon's momentum at step 0."""
    momentum_end: float
    """Muon's momentum after the warm-up."""
    momentum_warmup_steps: int
    """Steps over which Muon's momentum rises linearly."""
    cooldown_fraction: float
    """Last part of the steps, in which every learning rate falls linearly."""
    final_lr_factor: float
    """Factor of the learning rates at the end of the run."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    """Optimiser steps; every schedule is stretched over them."""
    batch_tokens: int
    """Tokens of one step, over all devices and micro-batches."""
    seq_len: int
    """Tokens of one training sequence."""
    final_window_tokens: int
    """The attention window grows linearly from one block of 128 tokens to this many."""
    val_every: int
    """Steps between evaluations; 0 evaluates only at the end."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations and of the embedding table; the other parameters are float32."""
    seed: int = 0
    """Seed of the initial weights."""
    devices: int | None = None
    """Devices to use; all by default."""
    micro_batches: int | None = None
    """Micro-batches a step is split into on each device; by default the fewest that fit in memory."""
    run_dir: str | None = None
    """Folder of the run; logs/<run-id> by default."""
    resume: int | Literal["latest"] | None = None
    """Go on with the run in --run-dir, from its newest checkpoint (no value) or from that of a step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only the end of the run, and where a signal stops it."""
    checkpoint_keep: int = 2
    """Newest checkpoints that are kept, beside the one with the best validation loss."""
    checkpoint_keep_every: int = 0
    """Checkpoints of every so many steps are kept too; 0 keeps none of them."""
    init_from: str | None = None
    """Start from these weights: a PyTorch checkpoint (.pt) or a run folder."""
    compilation_cache: str | None = "~/.cache/senano_jax/xla"
    """Folder of compiled programs, kept between runs; None compiles anew. JAX_COMPILATION_CACHE_DIR goes before it."""

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.seq_len


def check_config(config: Config) -> None:
    """Raises UserError at the first value that cannot work; needs no device and no file."""
    model, layers, data = config.model, config.model.layers, config.data
    for flag, value in _positive_integers(config).items():
        if not 1 <= value < 2**31:
            raise UserError(f"{flag} is {value}; it must be at least 1 and fit into 31 bits")
    for flag, value in {
        "--val-every": config.val_every,
        "--checkpoint-every": config.checkpoint_every,
        "--checkpoint-keep-every": config.checkpoint_keep_every,
        "--data.discard-micro-batch": data.discard_micro_batch,
        "--optimizer.momentum-warmup-steps": config.optimizer.momentum_warmup_steps,
        "--seed": config.seed,
        "--model.layers.loop": layers.loop,
        "--model.layers.visits": layers.visits,
    }.items():
        if not 0 <= value < 2**31:
            raise UserError(f"{flag} is {value}; it must not be negative and fit into 31 bits")

    if config.resume is not None and config.run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with")
    if model.dim % model.num_heads:
        raise UserError(
            f"--model.dim {model.dim} is not divisible by --model.num-heads {model.num_heads}; "
            "choose a width that is a multiple of the number of heads"
        )
    if model.head_dim % 4:
        raise UserError(
            f"--model.dim {model.dim} with --model.num-heads {model.num_heads} gives heads of {model.head_dim}; "
            "the rotary embedding needs a multiple of 4"
        )
    if model.attention == "flash" and not pallas_triton.fits(model.head_dim):
        raise UserError(
            f"--model.attention flash takes heads whose width is a power of two from 16 up, not {model.head_dim} "
            "(--model.dim / --model.num-heads); change these, or use --model.attention banded"
        )
    if not VOCAB_SIZE <= model.vocab_size <= model.padded_vocab_size:
        raise UserError(
            f"--model.padded-vocab-size {model.padded_vocab_size} is below --model.vocab-size {model.vocab_size}, or "
            f"both are below {VOCAB_SIZE}, the tokens of GPT-2 that shards hold; use at least that"
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
    for flag, length in {"--seq-len": config.seq_len, "--data.val-seq-len": data.val_seq_len}.items():
        if length % BLOCK:
            raise UserError(f"{flag} {length} is not a multiple of {BLOCK}, the block of the attention window")
    if config.final_window_tokens > config.seq_len:
        raise UserError(
            f"--final-window-tokens {config.final_window_tokens} is longer than --seq-len {config.seq_len}; "
            "shorten the window or lengthen the sequence"
        )
    if config.batch_tokens % config.seq_len:
        raise UserError(
            f"--batch-tokens {config.batch_tokens} is not a multiple of --seq-len {config.seq_len}; "
            f"the nearest is {max(1, round(config.batch_tokens / config.seq_len)) * config.seq_len}"
        )
    if data.val_tokens % data.val_seq_len:
        raise UserError(
            f"--data.val-tokens {data.val_tokens} is not a multiple of --data.val-seq-len {data.val_seq_len}; "
            f"the nearest is {max(1, round(data.val_tokens / data.val_seq_len)) * data.val_seq_len}"
        )
    for field in dataclasses.fields(config.optimizer):
        value, flag = getattr(config.optimizer, field.name), f"--optimizer.{field.name.replace('_', '-')}"
        bounded = field.name.startswith(("momentum_start", "momentum_end", "cooldown", "final", "adam_b"))
        if not (math.isfinite(value) and value >= 0 and (value <= 1 or not bounded)):
            raise UserError(
                f"{flag} is {value}; use a number from 0 to 1" if bounded else f"{flag} is {value}; use 0 or more"
            )


def check_split(config: Config, devices: int, micro_batches: int) -> None:
    """Raises UserError if the step's sequences cannot be dealt out evenly to the devices and micro-batches."""
    if config.batch_sequences % (devices * micro_batches):
        raise UserError(
            f"a step of {config.batch_sequences} sequences (--batch-tokens / --seq-len) cannot be split evenly over "
            f"{devices} devices x {micro_batches} micro-batches; change --devices, --micro-batches or --batch-tokens"
        )


def _positive_integers(config: Config) -> dict[str, int]:
    model, data = config.model, config.data
    return {
        "--steps": config.steps,
        "--batch-tokens": config.batch_tokens,
        "--seq-len": config.seq_len,
        "--final-window-tokens": config.final_window_tokens,
        "--devices": 1 if config.devices is None else config.devices,
        "--micro-batches": 1 if config.micro_batches is None else config.micro_batches,
        "--checkpoint-keep": config.checkpoint_keep,
        "--data.val-tokens": data.val_tokens,
        "--data.val-seq-len": data.val_seq_len,
        "--model.dim": model.dim,
        "--model.num-heads": model.num_heads,
        "--model.mlp-expansion": model.mlp_expansion,
        "--model.vocab-size": model.vocab_size,
        "--model.layers.prelude": model.layers.prelude,
    }
