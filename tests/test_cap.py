"""From products to logits, and back: against the numbers of the original function and against JAX's own derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces_reference import largest_error, reference

from senano_jax.errors import UserError
from senano_jax.model.cap import Plain, capped
from senano_jax.model.elementwise import norm
from senano_jax.model.loss import cross_entropy
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import targets_of

SHIFTED = SoftCap(height=23, divisor=7.5, shift=5, by_width=False)


def test_the_shifted_cap_is_the_original_one():
    _, arrays = reference("a_head_cap")
    z = jnp.arange(-60, 61, dtype=jnp.float32)
    cap = capped(SHIFTED, 64)
    logits = cap.logits(z)
    assert largest_error(logits, arrays["curve"]) < 3e-6
    assert largest_error(cap.pulled_back(jnp.ones_like(z), logits), arrays["curve_slope"]) < 3e-6


def test_head_cap_and_loss_are_the_original_ones():
    """Products of the normalised stream, cap and cross-entropy; gradients of stream and head."""
    inputs, arrays = reference("a_head_cap")
    targets = targets_of(jnp.asarray(inputs["y"])[None], None)

    def loss(x, head):
        return cross_entropy(norm(x)[None], head, targets, SHIFTED)

    value, (d_x, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(inputs["x"], inputs["W"])
    assert float(value) == pytest.approx(arrays["loss_nobias"].sum(), rel=3e-6)
    assert largest_error(d_x, arrays["d_x_nobias_ce"]) < 1e-5
    assert largest_error(d_head, arrays["d_W_nobias_ce"]) < 1e-5


@pytest.mark.parametrize("cap", [capped(SoftCap(), 64), capped(SHIFTED, 64), Plain(70)], ids=str)
def test_derivative_and_sum_are_those_of_the_logits(cap):
    z = 40 * jax.random.normal(jax.random.key(0), (8, 96))
    logits, pull_back = jax.vjp(cap.logits, z)
    cotangent = jax.random.normal(jax.random.key(1), z.shape)
    assert largest_error(cap.pulled_back(cotangent, logits), np.asarray(pull_back(cotangent)[0])) < 1e-6
    exact = functools.reduce(np.logaddexp, np.asarray(cap.all_logits(z), np.float64).T)
    np.testing.assert_allclose(cap.logsumexp(cap.all_logits(z)), exact, rtol=1e-6)


def test_the_default_divides_by_the_width_too():
    np.testing.assert_allclose(capped(SoftCap(), 64).logits(jnp.float32(60)), 30 / (1 + np.exp(-1)), rtol=1e-6)
    assert SHIFTED.at_width(64) == SHIFTED


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        (SoftCap(height=0), "--model.cap.height is 0; use a number above 0 and at most 75"),
        (SoftCap(height=200), "--model.cap.height is 200"),
        (SoftCap(divisor=0), "--model.cap.divisor is 0; use a number above 0"),
        (SoftCap(shift=float("nan")), "--model.cap.shift is nan; use a finite number"),
    ],
    ids=str,
)
def test_a_cap_that_cannot_work_is_refused(cap, message):
    with pytest.raises(UserError) as error:
        cap.check("--model.cap")
    assert message in str(error.value)
