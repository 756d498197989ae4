"""Which rule updates which parameter, and the whole optimiser."""

import jax
import optax

from senano_jax.optim.adam import scale_by_float32_adam
from senano_jax.optim.adamw import adamw
from senano_jax.optim.config import AdamWConfig, MuonAdamConfig
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


def make_optimizer(
    config: MuonAdamConfig | AdamWConfig, steps: int, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW, or Muon for the matrices of the layers and Adam at three rates for the rest.

    It expects gradients of summed losses, and in `update` the keyword argument `tokens`, how many they sum over.
    `steps` is the length of the run that the schedules are stretched over; `axis_name` a mapped axis of devices with
    equal gradients (see `scale_by_muon`).
    """
    if isinstance(config, AdamWConfig):
        return adamw(config, steps)

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
