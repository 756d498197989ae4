"""Several weighted predictions of a token, from one row of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cross_entropies, relative_error
from pieces_reference import largest_error, reference
from tiny import random_params, random_sequences, tiny_gpt2, tiny_model

from senano_jax.model.cap import Plain
from senano_jax.model.elementwise import norm
from senano_jax.model.loss import cross_entropy
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import ahead, targets_of

WEIGHTS = np.float32([1, 0.5, 0.25])


def test_tokens_ahead_and_the_end_of_a_sequence():
    """Of a sequence of four: what lies beyond its end weighs nothing, and no other sequence begins there."""
    next_BT = jnp.array([[11, 12, 13, 14], [21, 22, 23, 24]])
    tokens, weights = ahead(next_BT, jnp.array([1.0, 0.5, 0.25]))
    for b, first in enumerate((11, 21)):
        for t in range(4):
            for k in range(3):
                if t + k < 4:
                    assert (int(tokens[b, t, k]), float(weights[b, t, k])) == (first + t + k, WEIGHTS[k])
                else:
                    assert float(weights[b, t, k]) == 0
    with pytest.raises(ValueError, match="a sequence of 4 tokens has no token 5 ahead"):
        ahead(next_BT, jnp.ones(5))


def test_without_weights_the_next_token_alone():
    tokens, weights = targets_of(jnp.array([[1, 2]]), None)
    assert tokens.tolist() == [[[1], [2]]] and weights is None


def test_three_tokens_ahead_are_the_original_ones():
    """A sequence of two documents, whose border is crossed; the numbers of automatic differentiation. The original's
    bias is the head's row for a channel that is 1 in all tokens."""
    inputs, arrays = reference("a_head_mtp")
    cap = SoftCap(height=23, divisor=7.5, shift=5, by_width=False)
    targets = targets_of(jnp.asarray(inputs["y"])[None], jnp.asarray(WEIGHTS))

    def loss(x, head, bias):
        with_one = jnp.pad(norm(x)[None], ((0, 0), (0, 0), (0, 1)), constant_values=1)
        return cross_entropy(with_one, jnp.concatenate([head, bias[None]]), targets, cap, chunk_tokens=16)

    arguments = inputs["x"], inputs["W"], jnp.asarray(inputs["b"])
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
    assert float(value) == pytest.approx(float(arrays["loss_sum"]), rel=2e-6)
    assert float(loss(*arguments)) == pytest.approx(float(value), rel=1e-6)  # the undifferentiated path
    for gradient, name in zip(gradients, ("d_x", "d_W", "d_b")):
        assert largest_error(gradient, arrays[name]) < 1e-5, name


@pytest.mark.parametrize("cap", [SoftCap(), Plain(90)], ids=str)
def test_gradients_are_those_of_the_formula_in_float64(cap):
    """softmax sum_k w_k - sum_k w_k onehot_k, for weights that differ between tokens, and targets that coincide."""
    rng = np.random.default_rng(0)
    tokens, dim, vocabulary, count = 24, 16, 96, 4
    x, head = rng.standard_normal((1, tokens, dim)), 10 * rng.standard_normal((dim, vocabulary))
    next_1T = rng.integers(0, 3, (1, tokens))
    weights_K = rng.random(count)
    z = x[0] @ head
    if isinstance(cap, SoftCap):
        logits = 30 / (1 + np.exp(-z / 7.5 / dim**0.5))
        slope = logits * (1 - logits / 30) / 7.5 / dim**0.5
    else:
        logits, slope = np.where(np.arange(vocabulary) < 90, z, -np.inf), 1
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    expected, dz = 0.0, np.zeros_like(z)
    for t in range(tokens):
        for k in range(count):
            if t + k < tokens:
                target = next_1T[0, t + k]
                expected += weights_K[k] * cross_entropies(logits[t : t + 1], np.array([target]))[0]
                dz[t] += weights_K[k] * (softmax[t] - (np.arange(vocabulary) == target))
    dz *= slope

    targets = targets_of(jnp.asarray(next_1T, jnp.int32), jnp.asarray(weights_K, jnp.float32))
    x32, head32 = jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32)

    def loss(x, head):
        return cross_entropy(x, head, targets, cap, chunk_tokens=7)

    value, (d_x, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(x32, head32)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert relative_error(d_x[0], dz @ head.T) < 1e-5
    assert relative_error(d_head, x[0].T @ dz) < 1e-5


@pytest.mark.parametrize("model", [tiny_model(), tiny_gpt2()], ids=["gpt", "gpt2"])
def test_a_model_weighs_the_tokens_ahead(model):
    """The weighted sum of losses is linear in the weights; weights [1] are the plain loss; one compilation serves all
    weights of one number of predictions."""
    params, sequences = random_params(model), random_sequences(2, 256)

    @jax.jit
    def loss(weights):
        return model.apply({"params": params}, sequences[:, :-1], sequences[:, 1:], 2, loss_weights=weights)

    plain = float(jax.jit(model.apply)({"params": params}, sequences[:, :-1], sequences[:, 1:], 2))
    assert float(loss(jnp.ones(1))) == pytest.approx(plain, rel=1e-6)
    alone = [float(loss(jnp.eye(3)[k])) for k in range(3)]
    assert alone[0] == pytest.approx(plain, rel=1e-6)
    assert len({round(a) for a in alone}) == 3
    assert float(loss(jnp.asarray(WEIGHTS))) == pytest.approx(float(WEIGHTS @ alone), rel=1e-6)
