"""What an optimiser is told, and the checks that refuse what cannot work."""

import dataclasses
import math
from dataclasses import dataclass

from senano_jax.errors import UserError, check_counts


@dataclass(frozen=True)
class MuonAdamConfig:
    """Muon for the matrices of the layers and Adam for the rest, on sums over the tokens of a step."""

    muon_lr: float
    """Muon's learning rate, for the matrices of the blocks."""
    head_lr: float
    """Adam's learning rate for the output head."""
    embed_lr: float
    """Adam's learning rate for the embeddings."""
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
class AdamWConfig:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), on means over the tokens of a step."""

    learning_rate: float
    """Learning rate after the warm-up."""
    warmup_steps: int
    """Steps over which it rises linearly; then it falls as a cosine, to zero at the end of the run."""
    b1: float
    """Decay of the first moment."""
    b2: float
    """Decay of the second moment."""
    eps: float
    """Adam's epsilon, outside the root."""
    weight_decay: float
    """Share of a weight that a step at learning rate 1 takes away; tensors of fewer than two dimensions are spared."""
    clip_norm: float
    """Gradients whose norm over all parameters is larger are scaled down to it."""


_FROM_0_TO_1 = {
    "momentum_start",
    "momentum_end",
    "cooldown_fraction",
    "final_lr_factor",
    "adam_b1",
    "adam_b2",
    "b1",
    "b2",
}


def check_optimizer(optimizer: MuonAdamConfig | AdamWConfig) -> None:
    """Raises UserError at the first value that cannot work."""
    for field in dataclasses.fields(optimizer):
        value, flag = getattr(optimizer, field.name), f"--optimizer.{field.name.replace('_', '-')}"
        if field.type is int:
            check_counts({flag: value}, least=0)
        elif field.name in _FROM_0_TO_1:
            if not 0 <= value <= 1:
                raise UserError(f"{flag} is {value}; use a number from 0 to 1")
        elif not (math.isfinite(value) and value >= 0):
            raise UserError(f"{flag} is {value}; use 0 or more")
