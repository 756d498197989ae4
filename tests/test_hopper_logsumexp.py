"""Log-sum-exp inside the head's product: interpreted, on a Hopper GPU, in the loss, and what it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_rows import expected
from mosaic_interpreter import interpreted, needs_interpreter

from senano_jax.kernels import hopper_matmul
from senano_jax.model import hopper_logsumexp
from senano_jax.model.hopper_logsumexp import TILE, logsumexp
from senano_jax.model.loss import cross_entropy
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import Targets

CAP = SoftCap(height=30.0, divisor=100.0, by_width=False)  # its slope is that of logit_rows


def operands(tokens, depth, logits):
    """Of products with a standard deviation of 300, as in logit_rows."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens, depth), jnp.bfloat16)
    return x, (300 / depth**0.5 * jax.random.normal(keys[1], (depth, logits))).astype(jnp.bfloat16)


def check(x, head, cap=30.0, shift=0.0):
    result = logsumexp(x, head, cap=cap, slope=0.01, shift=shift)
    z = (np.asarray(x, np.float64) @ np.asarray(head, np.float64)).astype(x.dtype)
    reference, _ = expected(z, jnp.zeros((len(x), 1), int), shift=shift, cap=cap)
    # A product that rounds the other way changes its own logit by 2^-9 at most; approximate roots change all.
    np.testing.assert_allclose(result, reference, rtol=2e-4)


@pytest.fixture
def on_six_multiprocessors(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=6)])
    with interpreted(monkeypatch, detect_races=True):
        yield


@needs_interpreter
# One tile of each block; tiles that are left over, of several columns.
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 3)])
def test_of_all_tiles(on_six_multiprocessors, capsys, rows, columns):
    check(*operands(rows * TILE.cluster_rows, 128, columns * TILE.cluster_columns))
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.parametrize(("cap", "shift"), [(1.0, 0.0), (23.0, 50.0), (75.0, -50.0)])
def test_under_any_cap(on_six_multiprocessors, cap, shift):
    check(*operands(256, 64, 384), cap=cap, shift=shift)


@needs_interpreter
def test_logits_at_both_ends_of_the_cap(on_six_multiprocessors):
    x, head = operands(256, 64, 128)
    check(x, 50 * head)


@needs_interpreter
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_one_with_logits(on_six_multiprocessors, monkeypatch, weighted):
    """Without gradients; the loss with them stores logits."""
    x, head = operands(256, 64, 384)
    keys = jax.random.split(jax.random.key(1), 2)
    tokens = jax.random.randint(keys[0], (2, 128, 3 if weighted else 1), 0, 384)
    targets = Targets(tokens, jax.random.uniform(keys[1], tokens.shape) if weighted else None)

    def loss(x):
        return cross_entropy(x.reshape(2, 128, 64), head.astype(jnp.float32), targets, CAP)

    reference = loss(x)
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    found = []
    monkeypatch.setattr(hopper_logsumexp, "logsumexp", lambda *a, **k: found.append(1) or logsumexp(*a, **k))
    np.testing.assert_allclose(loss(x), reference, rtol=1e-5)
    assert found
    found.clear()
    jax.grad(loss)(x)
    assert not found


@pytest.mark.parametrize(
    ("tokens", "depth", "logits", "dtype", "fits"),
    [
        (131072, 768, 50304, jnp.bfloat16, True),
        (256, 64, 256, jnp.bfloat16, True),
        (131072, 768, 50304, jnp.float32, False),
        (128, 768, 50304, jnp.bfloat16, False),
        (256, 96, 50304, jnp.bfloat16, False),
        (256, 768, 50257, jnp.bfloat16, False),
    ],
)
def test_what_it_takes(monkeypatch, tokens, depth, logits, dtype, fits):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    assert hopper_logsumexp.fits(tokens, depth, logits, dtype) == fits
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: False)
    assert not hopper_logsumexp.fits(tokens, depth, logits, dtype)


@pytest.mark.parametrize(
    ("tokens", "logits", "dtype"),
    [(100, 128, jnp.bfloat16), (256, 128, jnp.float32), (256, 64, jnp.bfloat16)],
)
def test_refuses_what_it_does_not_take(tokens, logits, dtype):
    x, head = operands(tokens, 64, logits)
    with pytest.raises(ValueError, match="no kernel for logits of"):
        logsumexp(x.astype(dtype), head, cap=30.0, slope=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "logits"), [(256, 384), (256 * 77, 768), (2048, 50304)])
def test_on_a_gpu(tokens, logits):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check(*operands(tokens, 768, logits))
