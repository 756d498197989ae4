"""What an optimiser is told: a recipe of rules, one for each group of parameters, and what is refused because it cannot
work.

The field docstrings are the texts of `--help`; a rule that is None takes no flags.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from senano_jax.errors import UserError, check_counts
from senano_jax.optim.groups import GROUPS

_FROM_0_TO_1 = {"most": 1}
_DECAY = {"below": 1}  # from 0: an average that forgets nothing is corrected for its start by 1 / 0


@dataclass(frozen=True)
class Cooldown:
    """Learning rates stay, then fall linearly."""

    fraction: float = field(metadata=_FROM_0_TO_1)
    """Last part of the steps, in which every learning rate falls linearly."""
    floor: float = field(metadata=_FROM_0_TO_1)
    """Factor of the learning rates at the end of the run."""


@dataclass(frozen=True)
class WarmupCosine:
    """Learning rates rise linearly, then fall as half a cosine."""

    warmup_steps: int
    """Steps over which every learning rate rises linearly; then it falls as a cosine, to zero at the end of the run."""


@dataclass(frozen=True)
class Ramp:
    """A number that rises linearly at the beginning of the run."""

    start: float = field(metadata=_FROM_0_TO_1)
    """Value at step 0."""
    end: float = field(metadata=_FROM_0_TO_1)
    """Value after the warm-up."""
    warmup_steps: int
    """Steps from one to the other."""


@dataclass(frozen=True)
class MuonRule:
    """Momentum, then orthogonalisation of each matrix."""

    rate: float
    """Learning rate of Muon."""
    momentum: Ramp
    """Rate of the average of the gradients, and how much of it is in the step (Nesterov)."""
    iteration: Literal["newton-schulz", "polar-express", "six-step"] = "newton-schulz"
    """How matrices are orthogonalised: the first leaves singular values in 0.7 to 1.2, the others nearer to 1."""
    neuron_b2: float | None = field(default=None, metadata=_DECAY)
    """NorMuon: decay of the mean squares by which the neurons' steps are equalised; None: Muon."""
    query_key_columns: int | None = field(default=None, metadata={"least": 1})
    """Columns of queries and keys that are orthogonalised together, such as those of two heads; None: all."""
    down_rate: float = 1.0
    """Factor of the learning rate of the MLP's second projection."""
    decay: float = 0.0
    """Weight decay: what a step at learning rate 1 takes away of a weight, if it shrinks that weight too; of others,
    nothing. It falls with the square of the learning rate."""


@dataclass(frozen=True)
class AdamRule:
    """Adam, with decoupled weight decay if there is any (Loshchilov & Hutter, arXiv 1711.05101)."""

    rate: float
    """Learning rate of Adam."""
    b1: float = field(metadata=_DECAY)
    """Decay of the first moment."""
    b2: float = field(metadata=_DECAY)
    """Decay of the second moment."""
    eps: float = field(metadata={"above": 0})  # where all gradients were 0, a step would be 0 / 0
    """Adam's epsilon, outside the root; it is compared with gradients summed over a step, or with their means."""
    decay: float = 0.0
    """Share of a weight that a step at learning rate 1 takes away; tensors of fewer than two dimensions are spared."""
    state: Literal["parameters", "float32"] = "parameters"
    """Type in which the moments are kept."""
    every: int = field(default=1, metadata={"least": 1})
    """Steps between updates, which take the sum of the gradients since the last one; what is left at the end of the run
    is not used."""


@dataclass(frozen=True)
class TailAverage:
    """Evaluation, samples and exports take the weights blended with their average over the end of the run."""

    start: float = field(metadata=_FROM_0_TO_1)
    """Part of the run after which the average begins, as a copy of the weights."""
    horizon: float = field(metadata=_FROM_0_TO_1)
    """Steps that the average looks back, as a part of the run."""
    share: float = field(metadata=_FROM_0_TO_1)
    """Weight of the average in the blend; the rest is that of the last weights."""
    groups: tuple[str, ...]
    """Groups of parameters that are averaged."""


@dataclass(frozen=True)
class Recipe:
    """A rule for each group of parameters (senano_jax/optim/groups.py) and what all groups share.

    A group whose rule is None follows another group: `tables` the embeddings, `queries` the gates, `gates` the
    scalars, and all others the matrices.
    """

    matrices: MuonRule | AdamRule
    """Matrices of the layers."""
    schedule: Cooldown | WarmupCosine
    """What all learning rates are multiplied by."""
    head: AdamRule | None = None
    """Output head, and a table that is embedding and head; None: as the matrices."""
    embeddings: AdamRule | None = None
    """Embeddings of tokens and positions; None: as the matrices."""
    scalars: AdamRule | None = None
    """Lambdas, weights of skip connections, biases, scales of norms; None: as the matrices."""
    tables: AdamRule | None = None
    """Tables of values by token; None: as the embeddings."""
    gates: AdamRule | None = None
    """Small matrices that compute gates; None: as the scalars."""
    queries: AdamRule | None = None
    """Queries of attention over depth; None: as the gates."""
    mean_gradients: bool = False
    """Divide gradients by the tokens of the step; otherwise they are sums over them."""
    clip_norm: float | None = None
    """Gradients whose norm over all parameters is larger are scaled down to it; None: never."""
    average: TailAverage | None = None
    """What is read out of the run; None: its last weights."""

    def leader(self, group: str) -> str:
        """The group whose rule updates `group`: itself or, as long as that has none, the one that it follows."""
        while getattr(self, group) is None:
            group = _FOLLOWS.get(group, "matrices")
        return group


@dataclass(frozen=True)
class OwnOptimizer:
    """An optimiser that a program gave the run in place of a recipe (senano_jax/training/own.py)."""

    name: str
    """What the program calls it."""
    update_checksum: str
    """Of what it computes from the run's parameters: equal for equal optimisers under one version of JAX."""


_FOLLOWS = {"tables": "embeddings", "gates": "scalars", "queries": "gates"}


def check_optimizer(recipe: Recipe | OwnOptimizer) -> None:
    """Raises UserError at the first value that cannot work."""
    if isinstance(recipe, OwnOptimizer):
        return
    _check(recipe, "--optimizer")
    if recipe.average is not None and not recipe.average.groups:
        raise UserError(f"--optimizer.average.groups is empty; name some of {', '.join(GROUPS)}")
    for group in () if recipe.average is None else recipe.average.groups:
        if group not in GROUPS:
            raise UserError(f"--optimizer.average.groups names {group!r}; the groups are {', '.join(GROUPS)}")


def _check(part: Any, flag: str) -> None:
    for f in dataclasses.fields(part):
        value, name = getattr(part, f.name), f"{flag}.{f.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            _check(value, name)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        elif int in (f.type, *typing.get_args(f.type)):
            check_counts({name: value}, least=f.metadata.get("least", 0))
        elif most := f.metadata.get("most"):
            if not 0 <= value <= most:
                raise UserError(f"{name} is {value}; use a number from 0 to {most}")
        elif below := f.metadata.get("below"):
            if not 0 <= value < below:
                raise UserError(f"{name} is {value}; use a number from 0, and below {below}")
        elif "above" in f.metadata:
            if not f.metadata["above"] < value < math.inf:
                raise UserError(f"{name} is {value}; use a number above {f.metadata['above']}")
        elif not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}; use 0 or more")
