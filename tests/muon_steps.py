"""Steps of Muon on the gradients of a small layer."""

import jax
import numpy as np

from senano_jax.optim.momentum import nesterov
from senano_jax.optim.muon import scale_by_muon

SHAPES = {"qkv": (3, 48, 48), "out": (48, 48), "up": (48, 192), "down": (192, 48)}


def momentum(step):
    return 0.85 + step / 3000


def random_gradients(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def steps_of(rule, gradients, axis_name=None, wrap=lambda update: update, **options):
    """Yields updates and state of each step."""
    optimizer = scale_by_muon(nesterov(momentum), rule, axis_name, **options)
    state, update = optimizer.init(gradients[0]), jax.jit(wrap(optimizer.update))
    for gradient in gradients:
        updates, state = update(gradient, state)
        yield updates, state
