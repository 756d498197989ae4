"""Which rule updates which parameter, and the whole optimiser."""

import jax
import optax

from senano_jax.config import OptimizerConfig
from senano_jax.optim.adam import scale_by_float32_adam
from senano_jax.optim.muon import scale_by_muon
from senano_jax.optim.schedules import learning_rate_factor, muon_momentum


def parameter_group(path: tuple, parameter) -> str:
    """ "embed", "head", "muon" (matrices of the layers) or "scalar" (everything of fewer than two dimensions)."""
    name = path[-1].key
    if "embedding" in name:
        return "embed"
    if name == "head":
        return "head"
    return "muon" if parameter.ndim >= 2 else "scalar"


def make_optimizer(config: OptimizerConfig, steps: int, axis_name: str | None = None) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam at three rates for the rest; expects gradients of summed losses.

    `steps` is the length of the run that the schedules are stretched over; `axis_name` a mapped axis of devices with
    equal gradients (see `scale_by_muon`).
    """

    def adam(learning_rate: float):
        return optax.chain(
            scale_by_float32_adam(config.adam_b1, config.adam_b2, config.adam_eps),
            optax.scale_by_learning_rate(lambda step: learning_rate * learning_rate_factor(step, steps, config)),
        )

    rules = {
        "muon": optax.chain(
            scale_by_muon(lambda step: muon_momentum(step, config), axis_name),
            optax.scale_by_learning_rate(lambda step: config.muon_lr * learning_rate_factor(step, steps, config)),
        ),
        "head": adam(config.head_lr),
        "embed": adam(config.embed_lr),
        "scalar": adam(config.scalar_lr),
    }
    return optax.partition(rules, lambda params: jax.tree.map_with_path(parameter_group, params))
