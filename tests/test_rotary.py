"""Rotary position embedding: its formula, and the properties it is there for."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import rotary

from senano_jax.model.rotary import rotary_tables, rotate


def random_heads(seed, length=300, width=32, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, length, 3, width)), dtype)


@pytest.mark.parametrize("width", [8, 32, 128])
def test_rotation_is_the_formula(width):
    """Against float64 NumPy, pair by pair: half-split pairs, 1024^(-j/(D/4-1)), the second half of them still."""
    x = random_heads(0, width=width)
    turned = rotate(x, rotary_tables(300, width))
    for row in range(2):
        np.testing.assert_allclose(turned[row], rotary(x[row]), atol=1e-4)


def test_heads_of_128_have_the_published_frequencies():
    """The angle at position 1 is the frequency: 1024^(-j/31) for 32 pairs, 0 for the other 32."""
    cos, sin = rotary_tables(2, 128)
    assert cos.shape == sin.shape == (2, 1, 64)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(np.arctan2(sin, cos)[1, 0, :32], 1024.0 ** (-np.arange(32) / 31), rtol=1e-6)
    np.testing.assert_array_equal(sin[:, 0, 32:], 0)


def test_angles_are_accurate_at_the_far_end_of_a_validation_sequence():
    """Positions are not reset: at 131,071 float32 angles are still right to a few roundings of the frequency."""
    cos, sin = (np.asarray(table[-1, 0, :32], np.float64) for table in rotary_tables(131_072, 128))
    angle = 131_071 * 1024.0 ** (-np.arange(32) / 31)
    np.testing.assert_allclose(np.hypot(cos, sin), 1, rtol=1e-6)
    # Frequencies are float32 powers of float32 exponents, as in PyTorch: a few ulps each, times the position.
    tolerance = 8 * 2.0**-24 * angle + 1e-6
    assert (np.abs(np.sin(np.arctan2(sin, cos) - angle)) < tolerance).all()


def test_rotation_keeps_lengths_and_the_first_token():
    """A rotation is orthogonal, and the identity at position 0."""
    x = random_heads(1)
    turned = rotate(x, rotary_tables(300, 32))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_scores_depend_on_distance_only():
    """<rotate(q at s), rotate(k at t)> is a function of s - t: here, the same q and k at all positions."""
    q, k = (jnp.broadcast_to(random_heads(seed)[:1, :1, :1], (1, 300, 1, 32)) for seed in (2, 3))
    tables = rotary_tables(300, 32)
    scores = np.asarray(jnp.einsum("bqhd,bkhd->qk", rotate(q, tables), rotate(k, tables)))
    for distance in (0, 1, 17, 150):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-3)
    assert np.ptp(scores[:, 0]) > 0.1


def test_bfloat16_is_rounded_once():
    """Angles and products are float32 whatever x is."""
    x = random_heads(4, dtype=jnp.bfloat16)
    tables = rotary_tables(300, 32)
    turned = rotate(x, tables)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), tables).astype(jnp.bfloat16))
