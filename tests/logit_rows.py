"""Rows of products and what the loss's kernels must make of them."""

import jax
import numpy as np

CAP, SLOPE = 30.0, 0.01
HALF_ULP = 2.0**-8  # of bfloat16, as a share of the number that is rounded


def inputs(tokens, logits, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    z = (300 * jax.random.normal(keys[0], (tokens, logits))).astype(dtype)
    return z, jax.random.randint(keys[1], (tokens, 1), 0, logits)


def several(tokens, logits):
    """Three targets, some of which coincide, and their weights, some of which are 0."""
    keys = jax.random.split(jax.random.key(1), 2)
    targets = jax.random.randint(keys[0], (tokens, 3), 0, logits).at[::4, 2].set(logits - 1).at[::4, 1].set(logits - 1)
    weights = jax.random.uniform(keys[1], (tokens, 3)).at[::3, 1].set(0).at[-1].set(0)
    return targets, weights


def expected(z, targets, weights=None, shift=0.0, cap=CAP):
    """Log-sum-exp and gradient of z, float64 NumPy."""
    z = np.asarray(z, np.float64) + shift
    sigmoid = 1 / (1 + np.exp(-SLOPE * z))
    exponentials = np.exp(cap * sigmoid)
    total = exponentials.sum(-1, keepdims=True)
    weights = np.ones(targets.shape) if weights is None else np.asarray(weights, np.float64)
    d_logits = weights.sum(-1, keepdims=True) * exponentials / total
    for k in range(targets.shape[1]):
        d_logits[np.arange(len(z)), np.asarray(targets[:, k])] -= weights[:, k]
    return np.log(total)[:, 0], d_logits * cap * SLOPE * sigmoid * (1 - sigmoid)
