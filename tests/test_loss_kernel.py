"""The loss's kernel: on a CPU it runs interpreted, the same code as on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax.kernels.triton import RowLaunch
from senano_jax.model.loss_kernel import fits, logsumexp_and_gradient

CAP, SLOPE = 30.0, 0.01


def inputs(tokens, logits, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    z = (300 * jax.random.normal(keys[0], (tokens, logits))).astype(dtype)
    return z, jax.random.randint(keys[1], (tokens,), 0, logits)


def expected(z, targets, shift=0.0):
    """Float64 NumPy."""
    z = np.asarray(z, np.float64) + shift
    sigmoid = 1 / (1 + np.exp(-SLOPE * z))
    exponentials = np.exp(CAP * sigmoid)
    total = exponentials.sum(-1, keepdims=True)
    hit = np.asarray(targets)[:, None] == np.arange(z.shape[1])
    return np.log(total)[:, 0], (exponentials / total - hit) * CAP * SLOPE * sigmoid * (1 - sigmoid)


def test_against_numpy():
    z, targets = inputs(8, 384, jnp.float32)
    for launch in (RowLaunch(rows=4, warps=4), RowLaunch(rows=8, warps=2)):
        results = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, launch=launch, interpret=True)
        for result, reference in zip(results, expected(z, targets)):
            np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-6)


def test_a_shift_before_the_cap():
    z, targets = inputs(8, 384, jnp.float32)
    results = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, shift=150.0, interpret=True)
    for result, reference in zip(results, expected(z, targets, 150)):
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-6)


def test_what_it_takes():
    assert fits(8192, 50304)
    assert not fits(8192, 50257)
    assert not fits(8190, 50304)


@pytest.mark.gpu
def test_on_a_gpu():
    z, targets = inputs(64, 50304, jnp.bfloat16)
    logsumexp, dz = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE)
    reference, d_reference = expected(z, targets)
    np.testing.assert_allclose(logsumexp, reference, rtol=1e-5)
    error = np.asarray(dz, np.float64) - d_reference
    assert np.linalg.norm(error) <= 4e-3 * np.linalg.norm(d_reference)  # the result is rounded to bfloat16
