"""The loss's kernel: on a CPU it runs interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_rows import CAP, HALF_ULP, SLOPE, expected, inputs, several
from oracles import relative_error

from senano_jax.kernels.triton import RowLaunch
from senano_jax.model import loss as loss_module
from senano_jax.model.cap import Plain
from senano_jax.model.loss import cross_entropy, loss_is_fused
from senano_jax.model.loss_kernel import fits, logsumexp_and_gradient
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import Targets, targets_of

WEIGHTS = np.float32([1, 0.5, 0.25])
SHIFTED = SoftCap(height=23, divisor=7.5, shift=5, by_width=False)


def test_against_numpy():
    z, targets = inputs(8, 384, jnp.float32)
    for launch in (RowLaunch(rows=4, warps=4), RowLaunch(rows=8, warps=2)):
        results = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, launch=launch, interpret=True)
        for result, reference in zip(results, expected(z, targets)):
            np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-6)


def test_a_shift_before_the_cap():
    z, targets = inputs(8, 384, jnp.float32)
    results = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, shift=150.0, interpret=True)
    for result, reference in zip(results, expected(z, targets, shift=150)):
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-6)


def test_several_weighted_targets():
    """Where two of a token's targets are one, both of its weights count; a token without weights has no gradient."""
    z, _ = inputs(8, 384, jnp.float32)
    targets, weights = several(*z.shape)
    results = logsumexp_and_gradient(z, targets, weights, cap=CAP, slope=SLOPE, shift=50.0, interpret=True)
    for result, reference in zip(results, expected(z, targets, weights, 50)):
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(results[1][-1], 0)


def test_the_weight_one_is_no_weight():
    z, targets = inputs(8, 384, jnp.bfloat16)
    plain = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, interpret=True)
    weighted = logsumexp_and_gradient(z, targets, jnp.ones((8, 1)), cap=CAP, slope=SLOPE, interpret=True)
    for one, other in zip(plain, weighted):
        np.testing.assert_array_equal(one, other)


def test_what_it_takes(monkeypatch):
    assert fits(8192, 50304)
    assert not fits(8192, 50257)
    assert not fits(8190, 50304)
    monkeypatch.setattr(loss_module, "on_gpu", lambda: True)
    assert loss_is_fused(131_072, 50304, SHIFTED)
    assert not loss_is_fused(131_072, 50304, Plain(50257))


def by_differentiation(x, head, targets: Targets, cap: SoftCap):
    """Loss and gradients of x and head: JAX's own, in float64 but for the rounding of the products to x's type, which
    has the derivative 1."""
    with jax.enable_x64(True):
        dtype, arrays = x.dtype, [jnp.asarray(np.asarray(array, np.float64)) for array in (x, head)]
        tokens = jnp.asarray(targets.tokens)
        weights = 1 if targets.weights is None else jnp.asarray(np.asarray(targets.weights, np.float64))

        def loss(x, head):
            z = x @ head
            z += jax.lax.stop_gradient(z.astype(dtype).astype(z.dtype) - z)
            logits = cap.height * jax.nn.sigmoid((z + cap.shift) / cap.divisor)
            return -(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, -1)).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(*arrays)


def features(dtype, shape, columns):
    """x, head and the next tokens; logits all over the cap's range."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    head = jnp.asarray(np.asarray(rng.standard_normal((shape[-1], columns)), dtype), jnp.float32)
    return x, head, jnp.asarray(rng.integers(0, columns, shape[:2]), jnp.int32)


@pytest.mark.parametrize("count", [None, 1, 2, 3])
def test_the_loss_through_the_kernel(count, monkeypatch):
    """Value and all gradients, in two chunks, two sequences at whose ends targets are missing."""
    monkeypatch.setattr(loss_module, "on_gpu", lambda: True)
    calls = []

    def interpreted(*args, **options):
        calls.append(options)
        return logsumexp_and_gradient(*args, **options, interpret=True)

    monkeypatch.setattr(loss_module.loss_kernel, "logsumexp_and_gradient", interpreted)
    x, head, next_BT = features(jnp.float32, (2, 12, 16), 256)
    targets = targets_of(next_BT, None if count is None else jnp.asarray(WEIGHTS[:count]))
    loss = functools.partial(cross_entropy, targets=targets, cap=SHIFTED, chunk_tokens=12)
    value, (d_x, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(x, head)
    reference, gradients = by_differentiation(x, head, targets, SHIFTED)
    assert calls == [{"cap": 23, "slope": 1 / 7.5, "shift": 5}]  # traced once
    assert float(value) == pytest.approx(float(reference), rel=1e-6)
    assert relative_error(d_x, gradients[0]) < 3e-6
    assert relative_error(d_head, gradients[1]) < 3e-6


@pytest.mark.gpu
def test_on_a_gpu():
    z, targets = inputs(64, 50304, jnp.bfloat16)
    logsumexp, dz = logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE)
    reference, d_reference = expected(z, targets)
    np.testing.assert_allclose(logsumexp, reference, rtol=1e-5)
    error = np.asarray(dz, np.float64) - d_reference
    assert np.linalg.norm(error) <= 4e-3 * np.linalg.norm(d_reference)  # the result is rounded to bfloat16


@pytest.mark.gpu
def test_several_weighted_targets_on_a_gpu():
    """One rounding to bfloat16, and in each number 2e-5 for exponentials of 3 ulp, whose arguments reach 43."""
    z, _ = inputs(64, 50304, jnp.bfloat16)
    targets, weights = several(*z.shape)
    logsumexp, dz = logsumexp_and_gradient(z, targets, weights, cap=CAP, slope=SLOPE, shift=50.0)
    reference, d_reference = expected(z, targets, weights, 50)
    np.testing.assert_allclose(logsumexp, reference, rtol=1e-5)
    error = np.linalg.norm(np.asarray(dz, np.float64) - d_reference, axis=1)
    assert (error <= (HALF_ULP + 2e-5) * np.linalg.norm(d_reference, axis=1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [None, 1, 2, 3])
def test_the_loss_on_a_gpu(count):
    """In bfloat16 and the whole width of the vocabulary. The gradient of each product is rounded once, that of x once
    more; independent roundings make less than half of HALF_ULP each, sums in another order next to nothing."""
    x, head, next_BT = features(jnp.bfloat16, (2, 128, 64), 50304)
    assert loss_is_fused(next_BT.size, head.shape[1], SHIFTED)
    targets = targets_of(next_BT, None if count is None else jnp.asarray(WEIGHTS[:count]))
    loss = functools.partial(cross_entropy, targets=targets, cap=SHIFTED)
    value, (d_x, d_head) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, head)
    reference, gradients = by_differentiation(x, head, targets, SHIFTED)
    assert float(value) == pytest.approx(float(reference), rel=1e-4)
    assert relative_error(d_x, gradients[0]) < 2 * HALF_ULP
    assert relative_error(d_head, gradients[1]) < HALF_ULP
