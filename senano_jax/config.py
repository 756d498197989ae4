"""Everything a run can be told, as frozen dataclasses, and the checks that refuse what cannot work.

The field docstrings are the texts of `--help`. What distinguishes one system from another is in presets.py.
"""

from dataclasses import dataclass
from typing import Literal

from senano_jax.attention import BLOCK
from senano_jax.errors import UserError, check_counts
from senano_jax.model.config import Gpt2Config, LayerSchedule, ModelConfig, TransformerConfig, check_model
from senano_jax.optim.config import AdamWConfig, MuonAdamConfig, check_optimizer

__all__ = [
    "AdamWConfig",
    "Config",
    "DataConfig",
    "Gpt2Config",
    "LayerSchedule",
    "ModelConfig",
    "MuonAdamConfig",
    "TransformerConfig",
    "check_config",
    "check_split",
]


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
class Config:
    """One training run."""

    model: ModelConfig | Gpt2Config
    data: DataConfig
    optimizer: MuonAdamConfig | AdamWConfig
    steps: int
    """Optimiser steps; every schedule is stretched over them."""
    batch_tokens: int
    """Tokens of one step, over all devices and micro-batches."""
    seq_len: int
    """Tokens of one training sequence."""
    final_window_tokens: int
    """The attention window grows linearly to this many tokens, in whole blocks of 128."""
    val_every: int
    """Steps between evaluations; 0 evaluates only at the end."""
    initial_window_tokens: int = 0
    """The attention window at step 0; never less than one block of 128."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations and, except of GPT-2, of the embeddings; the other parameters are float32."""
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
    tensorboard: bool = False
    """Show the run's curves in TensorBoard too, from event files in its folder."""
    wandb: bool = False
    """Show the run's curves in Weights & Biases too."""

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.seq_len


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
