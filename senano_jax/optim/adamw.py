"""AdamW over gradients of a summed loss: their mean, clipped to a norm, with decay of all that is a matrix."""

import jax
import optax

from senano_jax.optim.adam import scale_by_float32_adam
from senano_jax.optim.config import AdamWConfig
from senano_jax.optim.schedules import learning_rate_factor


def adamw(config: AdamWConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """With g the gradient of the loss summed over n tokens, and norms taken over all parameters:

        g <- g / n
        g <- g min(1, clip_norm / ||g||)
        x <- x - lr (adam(g) + weight_decay x)        (no decay for x of fewer than two dimensions)

    `update` takes n as the keyword argument `tokens`; `steps` is the length of the run that lr is stretched over.
    """
    return optax.chain(
        mean_over_tokens(),
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_float32_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)),
        optax.scale_by_learning_rate(lambda step: config.learning_rate * learning_rate_factor(step, steps, config)),
    )


def mean_over_tokens() -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the keyword argument `tokens` of `update`."""

    def update(gradients, state, params=None, *, tokens, **_):
        del params
        return jax.tree.map(lambda g: g / tokens, gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
