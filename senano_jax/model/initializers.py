"""How matrices begin."""

import jax
import jax.numpy as jnp


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """Uniform with standard deviation 0.5 / sqrt(fan_in), for matrices [..., in, out]."""
    bound = 3**0.5 * 0.5 * shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
