"""Everything a run can be told, as frozen dataclasses, and the checks that refuse what cannot work.

The field docstrings are the texts of `--help`. What distinguishes one system from another is in presets.py.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from senano_jax.attention import BLOCK
from senano_jax.errors import UserError, check_counts
from senano_jax.model.config import Gpt2Config, LayerSchedule, ModelConfig, TransformerConfig, check_model
from senano_jax.optim.config import Recipe, check_optimizer

__all__ = [
    "Config",
    "DataConfig",
    "Gpt2Config",
    "LayerSchedule",
    "ModelConfig",
    "Recipe",
    "TransformerConfig",
    "changed",
    "check_config",
    "check_split",
    "settings",
]

Dataclass = TypeVar("Dataclass")

# Of a field that may differ between the parts of one run, or between runs that are compared as seeds: it says where and
# how something is computed, kept or watched, not what is computed.
FREE = {"free": True}


@dataclass(frozen=True)
class DataConfig:
    train_files: str = field(metadata=FREE)
    """Glob of the training shards, read in the order of their names."""
    val_files: str = field(metadata=FREE)
    """Glob of the validation shards."""
    val_tokens: int
    """Tokens of the validation stream that count, from its start."""
    val_seq_len: int
    """Tokens of one validation sequence."""
    discard_micro_batch: int = 0
    """Tokens skipped after every step, to replay the order of the PyTorch loader."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig | Gpt2Config
    data: DataConfig
    optimizer: Recipe
    steps: int
    """Optimiser steps; every schedule is stretched over them."""
    batch_tokens: int
    """Tokens of one step, over all devices and micro-batches."""
    seq_len: int
    """Tokens of one training sequence."""
    final_window_tokens: int
    """The attention window grows linearly to this many tokens, in whole blocks of 128."""
    val_every: int = field(metadata=FREE)
    """Steps between evaluations; 0 evaluates only at the end."""
    initial_window_tokens: int = 0
    """The attention window at step 0; never less than one block of 128."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations and, except of GPT-2, of the embeddings; the other parameters are float32."""
    seed: int = 0
    """Seed of the initial weights."""
    devices: int | None = field(default=None, metadata=FREE)
    """Devices to use; all by default."""
    micro_batches: int | None = field(default=None, metadata=FREE)
    """Micro-batches a step is split into on each device; by default the fewest that fit in memory."""
    run_dir: str | None = field(default=None, metadata=FREE)
    """Folder of the run; logs/<run-id> by default."""
    resume: int | Literal["latest"] | None = field(default=None, metadata=FREE)
    """Go on with the run in --run-dir, from its newest checkpoint (no value) or from that of a step."""
    checkpoint_every: int = field(default=0, metadata=FREE)
    """Steps between checkpoints; 0 saves only the end of the run, and where a signal stops it."""
    checkpoint_keep: int = field(default=2, metadata=FREE)
    """Newest checkpoints that are kept, beside the one with the best validation loss."""
    checkpoint_keep_every: int = field(default=0, metadata=FREE)
    """Checkpoints of every so many steps are kept too; 0 keeps none of them."""
    init_from: str | None = None
    """Start from these weights: a PyTorch checkpoint (.pt) or a run folder."""
    compilation_cache: str | None = field(default="~/.cache/senano_jax/xla", metadata=FREE)
    """Folder of compiled programs, kept between runs; None compiles anew. JAX_COMPILATION_CACHE_DIR goes before it."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Show the run's curves in TensorBoard too, from event files in its folder."""
    wandb: bool = field(default=False, metadata=FREE)
    """Show the run's curves in Weights & Biases too."""

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.seq_len


FREE_NAMES = frozenset(
    f.name
    for kind in (Config, DataConfig, ModelConfig, Gpt2Config)
    for f in dataclasses.fields(kind)
    if f.metadata.get("free")
)


def changed(config: Dataclass, differences: Mapping[str, Any]) -> Dataclass:
    """A copy of a (nested) dataclass with other values, each named by its path: {"model.layers.loop": 0}.

    Raises KeyError for a path that names no field.
    """
    for path, value in differences.items():
        name, _, rest = path.partition(".")
        if name not in {f.name for f in dataclasses.fields(config)}:
            raise KeyError(f"{type(config).__name__} has no field {name!r}")
        new = changed(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: new})
    return config


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a (nested) dataclass by their paths, such as "model.layers.loop", but for those of free fields: two
    configurations with equal settings compute the same."""
    values = {}
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), prefix + f.name
        if f.metadata.get("free"):
            continue
        if dataclasses.is_dataclass(value):
            values |= {path: type(value).__name__} | settings(value, path + ".")
        else:
            values[path] = value
    return values


def check_config(config: Config) -> None:
    """Raises UserError at the first value that cannot work; needs no device and no file."""
    model, data = config.model, config.data
    check_counts(
        {
            "--steps": config.steps,
            "--batch-tokens": config.batch_tokens,
            "--seq-len": config.seq_len,
            "--final-window-tokens": config.final_window_tokens,
            "--devices": 1 if config.devices is None else config.devices,
            "--micro-batches": 1 if config.micro_batches is None else config.micro_batches,
            "--checkpoint-keep": config.checkpoint_keep,
            "--data.val-tokens": data.val_tokens,
            "--data.val-seq-len": data.val_seq_len,
        },
        least=1,
    )
    check_counts(
        {
            "--val-every": config.val_every,
            "--checkpoint-every": config.checkpoint_every,
            "--checkpoint-keep-every": config.checkpoint_keep_every,
            "--data.discard-micro-batch": data.discard_micro_batch,
            "--initial-window-tokens": config.initial_window_tokens,
            "--seed": config.seed,
        },
        least=0,
    )
    if config.resume is not None and config.run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with")
    check_model(model)
    for flag, length in {"--seq-len": config.seq_len, "--data.val-seq-len": data.val_seq_len}.items():
        if length % BLOCK:
            raise UserError(f"{flag} {length} is not a multiple of {BLOCK}, the block of the attention window")
        if isinstance(model, Gpt2Config) and length > model.max_length:
            raise UserError(
                f"{flag} {length} is longer than --model.max-length {model.max_length}, the positions it knows; "
                "shorten the sequence or add positions"
            )
    if config.initial_window_tokens > config.final_window_tokens:
        raise UserError(
            f"--initial-window-tokens {config.initial_window_tokens} is more than --final-window-tokens "
            f"{config.final_window_tokens}; the window only grows"
        )
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
    check_optimizer(config.optimizer)


def check_split(config: Config, devices: int, micro_batches: int) -> None:
    """Raises UserError if the step's sequences cannot be dealt out evenly to the devices and micro-batches."""
    if config.batch_sequences % (devices * micro_batches):
        raise UserError(
            f"a step of {config.batch_sequences} sequences (--batch-tokens / --seq-len) cannot be split evenly over "
            f"{devices} devices x {micro_batches} micro-batches; change --devices, --micro-batches or --batch-tokens"
        )
