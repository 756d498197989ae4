"""Everything a run can be told, as frozen dataclasses.

The field docstrings are the texts of `--help`. What distinguishes one system from another is in record_systems.py and
ladder.py; what cannot work is refused by config_check.py; what follows for each step is in plan.py.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from senano_jax.model.config import Gpt2Config, LayerSchedule, ModelConfig, TransformerConfig
from senano_jax.optim.config import OwnOptimizer, Recipe

__all__ = [
    "Config",
    "DataConfig",
    "Gpt2Config",
    "LayerSchedule",
    "ModelConfig",
    "OwnOptimizer",
    "Recipe",
    "Stage",
    "TransformerConfig",
    "changed",
    "settings",
]

Dataclass = TypeVar("Dataclass")

# Of a field that may differ between the parts of one run, or between runs that are compared as seeds: it says where and
# how something is computed, kept or watched, not what is computed.
FREE = {"free": True}


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it."""

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
class Stage:
    """A part of a run that has steps, a rate or loss terms of its own.

    Parts are shares of the steps, not of the tokens: the schedules of the rates, of the momentum and of the window
    count in steps, so that a stage begins at the same place in each of them whatever the batches are.
    """

    part: float
    """Share of the run's steps, in proportion to the parts of the other stages; borders are rounded to whole steps."""
    batch_tokens: int | None = None
    """Tokens of one step; those of the run by default."""
    seq_len: int | None = None
    """Tokens of one sequence; those of the run by default."""
    rate: float = 1.0
    """Factor of all learning rates, beside that of the schedule."""
    ahead: tuple[tuple[float, float], ...] = ()
    """Weights in the loss of the token 1, 2, ... ahead. Each is a pair: its value at the stage's first step, and that
    which it moves to, linearly, until the next stage. By default the next token counts alone, with weight 1."""
    visits: int | None = None
    """Times that training applies the loop; as often as the model says by default, which evaluations always do."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig | Gpt2Config
    data: DataConfig
    optimizer: Recipe | OwnOptimizer
    steps: int
    """Optimiser steps; schedules are stretched over them, but for those parts that have steps of their own."""
    batch_tokens: int
    """Tokens of one step, over all devices and micro-batches, unless its stage says another number."""
    seq_len: int
    """Tokens of one training sequence, unless its stage says another number."""
    final_window_tokens: int
    """The attention window grows linearly to this many tokens, in whole blocks of 128."""
    val_every: int = field(metadata=FREE)
    """Steps between evaluations; 0 evaluates only at the end."""
    initial_window_tokens: int = 0
    """The attention window at step 0; never less than one block of 128."""
    evaluation_window_tokens: int | None = None
    """The attention window of evaluations grows to this many tokens, while that of training grows to its own; the
    window of training by default."""
    stages: tuple[Stage, ...] = ()
    """Parts of the run, one after another; without any it is the same from end to end."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations and, except of GPT-2, of the embeddings; the other parameters are float32."""
    seed: int = 0
    """Seed of the initial weights."""
    devices: int | None = field(default=None, metadata=FREE)
    """Devices to use; all by default."""
    micro_batches: int | None = field(default=None, metadata=FREE)
    """Micro-batches a step is split into on each device; by default the fewest that fit in memory."""
    share_matrices: bool = field(default=False, metadata=FREE)
    """Each device keeps the averages of its own share of the matrices (ZeRO stage 1), which halves what their gradients
    take on the way; by default every device keeps all."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that gradients are rounded to in order to travel between devices, also where there is only one."""
    deterministic: bool = field(default=False, metadata=FREE)
    """Have XLA choose operations on GPUs that give the same bits in every run on the same GPUs; slower."""
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
    """Start from these weights: a .safetensors file, a PyTorch checkpoint (.pt) or a run folder."""
    compilation_cache: str | None = field(default="~/.cache/senano_jax/xla", metadata=FREE)
    """Folder of compiled programs, kept between runs; None compiles anew. JAX_COMPILATION_CACHE_DIR goes before it."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Show the run's curves in TensorBoard too, from event files in its folder."""
    wandb: bool = field(default=False, metadata=FREE)
    """Show the run's curves in Weights & Biases too."""

    own_model: Annotated[str | None, tyro.conf.Suppress] = None
    """Class and checksum of the model that a program gave in place of the configured one (training/own.py)."""

    @property
    def batch_sequences(self) -> int:
        """Sequences of one step, unless its stage says otherwise."""
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
    """The values of a (nested) dataclass by their paths, such as "model.layers.loop" or "stages.0.rate", but for those
    of free fields: two configurations with equal settings compute the same."""
    values = {}
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), prefix + f.name
        if f.metadata.get("free"):
            continue
        if dataclasses.is_dataclass(value):
            values |= {path: type(value).__name__} | settings(value, path + ".")
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
            values[path] = len(value)
            for number, item in enumerate(value):
                values |= settings(item, f"{path}.{number}.")
        else:
            values[path] = value
    return values
