"""What a program gives a run in place of what its configuration says: an optimiser or a model of its own.

The configuration names it, with a checksum of what it computes, so that the run folder tells of it, comparisons keep it
apart, and another one cannot go on with the run.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.model.build import Model, abstract_params, make_model
from senano_jax.optim.config import OwnOptimizer
from senano_jax.training.mesh import DATA_AXIS


class Own(NamedTuple):
    """None: as configured."""

    optimizer: optax.GradientTransformation | None = None
    """It gets gradients of the mean loss, in nats a token (`on_mean_gradients`)."""
    model: Model | None = None
    """A linen module of the calls of `Gpt`: (inputs, targets, window_blocks) to the summed loss, float32."""


NOTHING_OWN = Own()


def on_mean_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` for a training step, which adds gradients up over its `tokens` and may have a factor `rate`: it gets
    means over the tokens, and its updates are multiplied by the factor. The state is its own."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(gradients, state, params=None, *, tokens, rate=None):
        means = jax.tree.map(lambda g: g / tokens, gradients)
        updates, state = optimizer.update(means, state, params, tokens=1)
        if rate is not None:
            updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def naming(config: Config, own: Own, optimizer_name: str) -> Config:
    """`config` with the names and checksums of what is given; allocates nothing. JAX must have been started."""
    model = make_model(config.model, config.dtype) if own.model is None else own.model
    params = abstract_params(model)
    if own.model is not None:
        tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
        checksum = _checksum((model.apply, {"params": params}, tokens, tokens, 1))
        config = dataclasses.replace(config, own_model=f"{type(model).__name__} {checksum}")
    if own.optimizer is not None:
        init, update = own.optimizer.init, optax.with_extra_args_support(own.optimizer).update

        def step(gradients, state, params):
            return update(gradients, state, params, tokens=1)

        checksum = _checksum((init, params), (step, params, jax.eval_shape(init, params), params))
        config = dataclasses.replace(config, optimizer=OwnOptimizer(optimizer_name, checksum))
    return config


def require_own(config: Config, own: Own) -> None:
    """Raises UserError if `config` names a model or an optimiser that is not given, or if one of its stages asks for
    what a model that is given is not called with."""
    if own.optimizer is None and isinstance(config.optimizer, OwnOptimizer):
        raise UserError(
            f"the run's optimiser {config.optimizer.name!r} is a program's own; train there: "
            "senano_jax.fit(config, optimizer)"
        )
    if own.model is None and config.own_model is not None:
        raise UserError(f"the run's model {config.own_model} is a program's own; train there: senano_jax.fit(...)")
    for number, stage in enumerate(config.stages if own.model is not None else ()):
        for name, asked in (("ahead", stage.ahead), ("visits", stage.visits)):
            if asked:
                raise UserError(
                    f"--stages.{number}.{name} is for the models of this package: one of a program's own is called "
                    "with inputs, targets and window alone; leave it out"
                )


def _checksum(*calls: tuple[Callable[..., Any], *tuple[Any, ...]]) -> str:
    """Eight hexadecimal digits of what functions compute from abstract arguments: operations, numbers and arrays, but
    no names of functions and no addresses."""
    digest = hashlib.sha256()
    for function, *arguments in calls:
        traced = jax.make_jaxpr(function, axis_env=[(DATA_AXIS, 1)])(*arguments)
        digest.update(re.sub(r"\bat 0x[0-9a-f]+|\bname=\S+", "", str(traced)).encode())
        for constant in traced.consts:
            is_key = jnp.issubdtype(jnp.result_type(constant), jax.dtypes.prng_key)
            digest.update(np.asarray(jax.random.key_data(constant) if is_key else constant).tobytes())
    return digest.hexdigest()[:8]
