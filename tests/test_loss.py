"""Cross-entropy of soft-capped and of plain logits: value, gradients and the memory it may take."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cross_entropies, relative_error, soft_capped_logits

from senano_jax.model import loss as loss_module
from senano_jax.model.cap import Plain, capped
from senano_jax.model.loss import CHUNK_TOKENS
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import targets_of

DIM, VOCABULARY = 32, 300


def soft_capped_cross_entropy(x, head, targets, chunk_tokens=None):
    return loss_module.cross_entropy(x, head, targets_of(targets, None), SoftCap(), chunk_tokens=chunk_tokens)


def cross_entropy(x, head, targets, vocab_size, chunk_tokens=None):
    cap = Plain(vocab_size)
    return loss_module.cross_entropy(x, head, targets_of(targets, None), cap, chunk_tokens=chunk_tokens)


def inputs(seed=0, dtype=jnp.float32, tokens=(2, 96)):
    """x, head and targets with logits all over the cap's range, saturated ones included."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((*tokens, DIM)), dtype)
    head = jnp.asarray(15 * rng.standard_normal((DIM, VOCABULARY)), jnp.float32)
    return x, head, jnp.asarray(rng.integers(0, VOCABULARY, tokens), jnp.int32)


def plain_loss(x, head, targets):
    """The formula at once and by JAX's own cross-entropy, to be differentiated automatically."""
    z = (x @ head.astype(x.dtype)).astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(30 * jax.nn.sigmoid(z / (7.5 * math.sqrt(DIM))))
    return -jnp.take_along_axis(log_probabilities, targets[..., None], -1).sum()


def test_loss_is_the_sum_over_tokens():
    """Against float64 NumPy."""
    x, head, targets = inputs()
    logits = soft_capped_logits(np.asarray(x, np.float64), np.asarray(head, np.float64).T)
    expected = cross_entropies(logits, np.asarray(targets)).sum()
    loss = soft_capped_cross_entropy(x, head, targets)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(capped(SoftCap(), DIM).logits(x @ head), logits, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_formula_in_float64():
    """d loss / d logits = softmax - one-hot, through the cap's slope l (1 - l / 30) / (7.5 sqrt(dim))."""
    x, head, targets = inputs(1)
    x64, head64 = np.asarray(x, np.float64).reshape(-1, DIM), np.asarray(head, np.float64)
    logits = soft_capped_logits(x64, head64.T)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dz = (softmax - np.eye(VOCABULARY)[np.asarray(targets).ravel()]) * logits * (1 - logits / 30)
    dz /= 7.5 * math.sqrt(DIM)
    d_x, d_head = jax.grad(soft_capped_cross_entropy, argnums=(0, 1))(x, head, targets)
    assert relative_error(d_x.reshape(-1, DIM), dz @ head64.T) < 2e-6
    assert relative_error(d_head, x64.T @ dz) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "tolerance"), [(jnp.float32, 1e-6, 2e-6), (jnp.bfloat16, 1e-4, 1e-2)]
)
def test_gradients_are_those_of_plain_differentiation(dtype, loss_tolerance, tolerance):
    """Including the types: x's gradient has x's, the head's is float32; and a cotangent other than 1."""
    x, head, targets = inputs(2, dtype)
    ours = jax.value_and_grad(lambda *a: -2.5 * soft_capped_cross_entropy(*a, targets), argnums=(0, 1))(x, head)
    plain = jax.value_and_grad(lambda *a: -2.5 * plain_loss(*a, targets), argnums=(0, 1))(x, head)
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=loss_tolerance)
    for gradient, expected in zip(ours[1], plain[1]):
        assert gradient.dtype == expected.dtype
        assert relative_error(gradient, expected) < tolerance


@pytest.mark.parametrize("scale", [0.1, 30])
def test_plain_logits(scale):
    """Value and gradients against float64, also where exp would overflow; columns beyond the vocabulary weigh nothing
    and get no gradient."""
    x, head, targets = inputs(5)
    x, counted, flat = scale * x, VOCABULARY - 44, np.asarray(targets % (VOCABULARY - 44)).ravel()
    x64, head64 = np.asarray(x, np.float64).reshape(-1, DIM), np.asarray(head, np.float64)[:, :counted]
    logits = x64 @ head64
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    dz = softmax / softmax.sum(-1, keepdims=True) - np.eye(counted)[flat]
    gradient = jax.value_and_grad(cross_entropy, argnums=(0, 1))
    loss, (d_x, d_head) = gradient(x, head, targets % counted, counted, 64)
    assert float(loss) == pytest.approx(cross_entropies(logits, flat).sum(), rel=1e-6)
    assert relative_error(d_x.reshape(-1, DIM), dz @ head64.T) < 1e-5
    assert relative_error(d_head[:, :counted], x64.T @ dz) < 1e-5
    np.testing.assert_array_equal(d_head[:, counted:], 0)
    alone = cross_entropy(x, head, targets % counted, counted)  # the undifferentiated path
    assert float(alone) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 96, 192, 10_000])
def test_the_chunk_size_changes_nothing_but_the_order_of_sums(chunk_tokens):
    """Also where it does not divide the tokens, or exceeds them."""
    x, head, targets = inputs(3)
    gradient = jax.value_and_grad(soft_capped_cross_entropy, argnums=(0, 1))
    loss, (d_x, d_head) = gradient(x, head, targets, chunk_tokens)
    whole_loss, (whole_d_x, whole_d_head) = gradient(x, head, targets)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    assert relative_error(d_x, whole_d_x) < 1e-6
    assert relative_error(d_head, whole_d_head) < 1e-6
    alone = soft_capped_cross_entropy(x, head, targets, chunk_tokens)  # the undifferentiated path
    assert float(alone) == pytest.approx(float(loss), rel=1e-6)


def test_a_head_of_zeros_loses_the_logarithm_of_the_padded_vocabulary():
    """The padding columns take part in the softmax: ln 50304 a token, the loss at step 0 of every run."""
    x, targets = inputs()[0], jnp.full((2, 96), 50256)
    for dtype in (jnp.float32, jnp.bfloat16):
        loss = soft_capped_cross_entropy(x.astype(dtype), jnp.zeros((DIM, 50304)), targets)
        assert float(loss) / targets.size == pytest.approx(math.log(50304), rel=1e-6)


def test_saturated_logits_are_finite():
    """At +-30 of the cap's argument nothing overflows, although no maximum is subtracted."""
    x, head, targets = inputs(4)
    loss, (d_x, d_head) = jax.value_and_grad(soft_capped_cross_entropy, argnums=(0, 1))(1e4 * x, head, targets)
    assert float(loss) == pytest.approx(float(plain_loss(1e4 * x, head, targets)), rel=1e-5)
    assert bool(jnp.isfinite(d_x).all() & jnp.isfinite(d_head).all())


@pytest.mark.parametrize("chunk_tokens", [None, CHUNK_TOKENS], ids=["of this backend", "of accelerators"])
def test_memory_of_a_validation_sequence_stays_below_all_its_logits(chunk_tokens):
    """131,072 tokens at full width, planned by the compiler and never allocated: forward and backward pass take less
    than a quarter of one float32 array [tokens, 50304]; the plain formula takes more than one."""
    tokens, dim, vocabulary = 131_072, 768, 50_304
    x = jax.ShapeDtypeStruct((1, tokens, dim), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((dim, vocabulary), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def temporaries(function):
        return jax.jit(function).lower(x, head, targets).compile().memory_analysis().temp_size_in_bytes

    loss = functools.partial(soft_capped_cross_entropy, chunk_tokens=chunk_tokens)
    all_logits = 4 * tokens * vocabulary
    assert temporaries(loss) < all_logits / 4
    assert temporaries(jax.grad(loss, argnums=(0, 1))) < all_logits / 4
    assert temporaries(jax.grad(plain_loss, argnums=(0, 1))) > all_logits
