"""What training and profiling build from a configuration, in the order that they need it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.model.build import Model, make_model
from senano_jax.optim.config import OwnOptimizer
from senano_jax.optim.recipe import can_share, make_optimizer
from senano_jax.optim.shares import Shares
from senano_jax.plan import Plan
from senano_jax.training.memory import choose_micro_batches, memory_budget
from senano_jax.training.mesh import DATA_AXIS, make_mesh, replicated
from senano_jax.training.own import NOTHING_OWN, Own, on_mean_gradients, require_own
from senano_jax.training.state import TrainState, abstract_state, state_shardings
from senano_jax.training.step import StepMetrics, make_train_step


class Wiring(NamedTuple):
    """All that a training step needs. A stage's entries are found by its index."""

    plan: Plan
    mesh: Mesh
    model: Model
    optimizer: optax.GradientTransformation
    state: TrainState
    """Shapes and dtypes of a state as checkpoints hold it."""
    to_shared: Callable[[TrainState], TrainState]
    """Makes of such a state the one that a step takes: where devices share averages, each keeps its own."""
    to_replicated: Callable[[TrainState], TrainState]
    """The way back."""
    micro_batches: tuple[int, ...]
    """For each stage, on each device."""
    train_steps: tuple[Callable[..., tuple[TrainState, StepMetrics]], ...]
    """For each stage, see make_train_step. It is compiled by its first call, on the training clock: a run pays for what
    it comes to, its first step included, and one that is stopped early, or found compiled in the cache, does not wait
    for programs that it does not need."""


def wire(config: Config, own: Own = NOTHING_OWN) -> Wiring:
    """Allocates nothing; `own` stands in place of what is configured.

    Raises UserError for devices that cannot do what `config` asks for, which has been checked, for something own that
    is not given, and for a model whose parameters the recipe does not know.
    """
    require_own(config, own)
    plan, mesh = Plan(config), make_mesh(config.devices)
    model = make_model(config.model, config.dtype) if own.model is None else own.model
    shares = _shares(config, mesh)
    if own.optimizer is None:
        optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    else:
        optimizer = on_mean_gradients(own.optimizer)
    try:
        state = abstract_state(model, optimizer)
    except ValueError as error:
        if own.model is None or own.optimizer is not None:
            raise
        raise UserError(f"the recipe does not suit the model ({error}); give it an optimiser too") from error
    to_shared, to_replicated = _forms(state, shares, mesh)
    micro_batches = choose_micro_batches(plan, mesh.size, memory_budget(jax.eval_shape(to_shared, state), mesh))
    of_step = optimizer if shares is None else make_optimizer(config.optimizer, config.steps, DATA_AXIS, shares)

    @functools.cache
    def train_step(visits: int | None):
        return make_train_step(model, of_step, mesh, visits, shares, config.reduce_dtype)

    train_steps = tuple(train_step(stage.visits) for stage in plan.stages)
    return Wiring(plan, mesh, model, optimizer, state, to_shared, to_replicated, micro_batches, train_steps)


def _shares(config: Config, mesh: Mesh) -> Shares | None:
    """None if every device keeps the averages of all matrices."""
    if not config.share_matrices:
        return None
    if isinstance(config.optimizer, OwnOptimizer) or not can_share(config.optimizer):
        raise UserError(
            "--share-matrices is for recipes that give the matrices to Muon, and no other group to their rule, and "
            "neither average nor clip gradients; drop it"
        )
    return Shares(DATA_AXIS, mesh.size, config.optimizer.matrices.query_key_columns)


def _forms(state: TrainState, shares: Shares | None, mesh: Mesh) -> tuple[Callable, Callable]:
    """`Wiring.to_shared` and `Wiring.to_replicated`, of a state as checkpoints hold it."""
    if shares is None:
        return lambda state: state, lambda state: state

    def gather(shared):
        everywhere = jax.lax.with_sharding_constraint(shared, replicated(mesh))  # XLA would cut up what is shared
        return shares.to_replicated(everywhere, state.opt_state)

    abstract = jax.eval_shape(shares.to_shared, state.opt_state)
    to_shared = jax.jit(shares.to_shared, out_shardings=state_shardings(abstract, mesh))
    to_replicated = jax.jit(gather, out_shardings=state_shardings(state.opt_state, mesh))
    return (
        lambda state: state._replace(opt_state=to_shared(state.opt_state)),
        lambda state: state._replace(opt_state=to_replicated(state.opt_state)),
    )
