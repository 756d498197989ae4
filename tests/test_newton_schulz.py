"""Newton-Schulz: what it does to singular values, and what it must leave alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import newton_schulz, relative_error

from senano_jax.optim.newton_schulz import orthogonalize


def random_matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (128, 100)])
def test_singular_values_come_near_one(shape):
    """Spread over two decades, they end in [0.6, 1.3], whether the matrix is square or not."""
    u, singular, vt = np.linalg.svd(random_matrix(shape), full_matrices=False)
    matrix = u * np.geomspace(0.01, 1, len(singular), dtype=np.float32) @ vt
    singular = np.linalg.svd(np.asarray(orthogonalize(matrix), np.float64), compute_uv=False)
    assert singular.min() > 0.6
    assert singular.max() < 1.3


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_singular_vectors_are_kept(shape):
    """U f(S) V^T: between the two sets of singular vectors of the input, the result is diagonal."""
    matrix = random_matrix(shape)
    u, _, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    inner = u.T @ np.asarray(orthogonalize(matrix), np.float64) @ vt.T
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.03  # bfloat16, five times
    assert np.diag(inner).min() > 0.6


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_it_is_the_iteration_up_to_bfloat16(shape):
    """Against the five steps in float64."""
    matrix = random_matrix(shape, seed=1)
    assert relative_error(orthogonalize(matrix), newton_schulz(matrix)) < 0.02


def test_matrices_of_a_stack_do_not_meet():
    """Each is divided by its own norm and multiplied with itself: the bits are those of the matrix alone."""
    stack = random_matrix((3, 2, 32, 64)) * np.array([1e-3, 1, 1e3], np.float32)[:, None, None, None]
    together = orthogonalize(stack)
    assert together.dtype == jnp.bfloat16
    for i in range(3):
        for j in range(2):
            assert relative_error(together[i, j], newton_schulz(stack[i, j])) < 0.02


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_scale_of_the_input_does_not_matter(scale):
    """But for the epsilon in the norm, far below any gradient of a summed loss."""
    matrix = random_matrix((32, 64))
    assert relative_error(orthogonalize(scale * matrix), newton_schulz(matrix)) < 0.02


def test_a_zero_matrix_stays_zero_beside_others():
    """A parameter without gradient must not move, let alone become NaN."""
    stack = random_matrix((2, 32, 64))
    stack[0] = 0
    result = np.asarray(orthogonalize(stack), np.float32)
    np.testing.assert_array_equal(result[0], 0)
    assert np.linalg.norm(result[1]) > 1
