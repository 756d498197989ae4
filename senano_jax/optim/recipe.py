"""A recipe as an optax transformation, and what a log records of it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from senano_jax.optim.adam import scale_by_float32_adam
from senano_jax.optim.average import with_tail_average
from senano_jax.optim.config import AdamRule, MuonRule, Recipe
from senano_jax.optim.decay import add_cautious_decay
from senano_jax.optim.groups import GROUPS, parameter_group
from senano_jax.optim.muon import orthogonalized, scale_by_muon
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.normuon import normalized
from senano_jax.optim.schedules import learning_rate_factor, ramp
from senano_jax.optim.shares import Shares, scale_by_shared_muon

# The names of the groups' states in checkpoints.
_STATES = {"matrices": "muon", "head": "head", "embeddings": "embed", "scalars": "scalar"}


def make_optimizer(
    recipe: Recipe, steps: int, axis_name: str | None = None, shares: Shares | None = None
) -> optax.GradientTransformationExtraArgs:
    """The rule of each group, after whatever is done to all gradients.

    With g the gradient of the loss summed over n tokens, and norms taken over all parameters:

        g <- g / n                                    (mean_gradients)
        g <- g min(1, clip_norm / ||g||)              (clip_norm)
        x <- x - lr rule(g)

    `update` takes the keyword arguments `tokens`, n, and `rate`, None or a traced scalar that multiplies every learning
    rate. `steps` is the length of the run that schedules are stretched over; `axis_name` a mapped axis of devices with
    equal gradients (see `scale_by_muon`). With `shares`, for a recipe that `can_share`, each device keeps the averages
    of its own matrices, and `update` takes the keyword argument `stacks` of `scale_by_shared_muon`.

    An average is kept in the state, for `read_out` (average.py). `init` raises ValueError for a parameter that belongs
    to no group, unless one rule updates them all.
    """
    if recipe.average is not None:
        inner = make_optimizer(dataclasses.replace(recipe, average=None), steps, axis_name, shares)
        return with_tail_average(inner, recipe.average, steps)
    leaders = dict.fromkeys(recipe.leader(group) for group in GROUPS)
    rules = {
        _STATES.get(group, group): _rule(getattr(recipe, group), recipe, steps, axis_name, shares) for group in leaders
    }
    before = []
    if recipe.mean_gradients:
        before.append(mean_over_tokens())
    if recipe.clip_norm is not None:
        before.append(optax.clip_by_global_norm(recipe.clip_norm))
    if len(rules) == 1:
        (transforms,) = rules.values()
        return optax.chain(*before, *transforms)

    def label(path, _):
        group = recipe.leader(parameter_group(path))
        return _STATES.get(group, group)

    by_group = optax.partition(
        {name: optax.chain(*transforms) for name, transforms in rules.items()},
        functools.partial(jax.tree.map_with_path, label),
    )
    return optax.chain(*before, by_group) if before else by_group


def can_share(recipe: Recipe) -> bool:
    """Whether devices can share the averages of the matrices: Muon's, no other group follows their rule, and nothing is
    done to all gradients before."""
    alone = all(recipe.leader(group) != "matrices" for group in GROUPS if group != "matrices")
    return alone and isinstance(recipe.matrices, MuonRule) and not recipe.mean_gradients and recipe.clip_norm is None


def _rule(
    rule: MuonRule | AdamRule, recipe: Recipe, steps: int, axis_name: str | None, shares: Shares | None
) -> list[optax.GradientTransformation]:
    def learning_rate(step):
        return rule.rate * learning_rate_factor(step, steps, recipe.schedule)

    if isinstance(rule, AdamRule):
        return _adam(rule, learning_rate)
    decay = [add_cautious_decay(rule.decay, learning_rate, rule.down_rate)] if rule.decay else []
    return [_muon(rule, axis_name, shares), *decay, scale_by_rate(learning_rate)]


def _adam(rule: AdamRule, learning_rate: Callable) -> list[optax.GradientTransformation]:
    def rate_of_update(count):
        return learning_rate(count if rule.every == 1 else rule.every * count + rule.every - 1)

    decay = [optax.add_decayed_weights(rule.decay, mask=_of_two_dimensions)] if rule.decay else []
    dtype = jnp.float32 if rule.state == "float32" else None
    transforms = [scale_by_float32_adam(rule.b1, rule.b2, rule.eps, dtype), *decay, scale_by_rate(rate_of_update)]
    if rule.every == 1:
        return transforms
    on_sums = optax.MultiSteps(optax.chain(*transforms), rule.every, use_grad_mean=False)
    return [optax.GradientTransformationExtraArgs(on_sums.init, on_sums.update)]


def _muon(rule: MuonRule, axis_name: str | None, shares: Shares | None) -> optax.GradientTransformation:
    on_stacks = orthogonalized(ITERATIONS[rule.iteration])
    if rule.neuron_b2 is not None:
        on_stacks = normalized(on_stacks, rule.neuron_b2)

    def mu(step):
        return ramp(step, rule.momentum)

    if shares is not None:
        return scale_by_shared_muon(mu, on_stacks, shares, rule.down_rate)
    return scale_by_muon(mu, on_stacks, axis_name, rule.query_key_columns, rule.down_rate)


def _of_two_dimensions(params):
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def scale_by_rate(schedule: Callable) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` of a function of the step, times the keyword argument `rate` of `update`."""
    by_schedule = optax.scale_by_learning_rate(schedule)

    def update(updates, state, params=None, *, rate=None, **_):
        updates, state = by_schedule.update(updates, state, params)
        return updates if rate is None else jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(by_schedule.init, update)


def mean_over_tokens() -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the keyword argument `tokens` of `update`."""

    def update(gradients, state, params=None, *, tokens, **_):
        del params
        return jax.tree.map(lambda g: g / tokens, gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def schedule_values(recipe: Recipe, steps: int) -> dict[str, np.ndarray]:
    """What the log records of each step, float32 [steps]: `lr`, the factor of all learning rates, and `momentum` if
    there is one."""
    every = np.arange(steps)
    values = {"lr": np.asarray(learning_rate_factor(every, steps, recipe.schedule))}
    if isinstance(recipe.matrices, MuonRule):
        values["momentum"] = np.asarray(ramp(every, recipe.matrices.momentum))
    return values
