"""Drawing tokens: the most probable one is that of the model's formula, and the others come as often as they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gpt_logits
from tiny import TINY, random_params, random_sequences, tiny_model

from senano_jax.interop.torch_checkpoint import to_torch
from senano_jax.model.sampling import choose_token, generate

MODEL = tiny_model()
PARAMS = random_params(MODEL)
SCHEDULE = [0, 1, 2, 1, 2, 3]
PROMPT = random_sequences(1, 126)[0, :126].tolist()


def greedy(params, count, window=2):
    return list(generate(MODEL, params, PROMPT, count, window, jax.random.key(0), temperature=0))


@pytest.mark.parametrize("window", [1, 2])
def test_greedy_tokens_are_the_most_probable_after_the_whole_prefix(window):
    """By the model's formula in float64, on the prefix alone: neither the padding nor the border of a block, which
    these tokens cross, is seen."""
    weights = to_torch(PARAMS, TINY)
    tokens = list(PROMPT)
    for token in greedy(PARAMS, 6, window):
        logits = gpt_logits(weights, np.array(tokens), window, SCHEDULE, TINY.num_heads)[-1, : TINY.vocab_size]
        assert token == np.argmax(logits)
        tokens.append(token)
    assert len(tokens) == len(PROMPT) + 6


def test_padding_columns_of_the_head_are_never_chosen():
    """Here one of them is the most probable of all."""
    params = PARAMS | {"head": PARAMS["head"].at[:, TINY.vocab_size :].multiply(100)}
    logits = gpt_logits(to_torch(params, TINY), np.array(PROMPT), 2, SCHEDULE, TINY.num_heads)[-1]
    assert np.argmax(logits) >= TINY.vocab_size
    assert greedy(params, 4) == greedy(PARAMS, 4)


def test_draws_depend_on_the_key_alone():
    first, again, other = (list(generate(MODEL, PARAMS, PROMPT, 8, 2, jax.random.key(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 2, "each position draws anew"


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 3), (2.0, 2), (1.0, 1)])
def test_tokens_come_with_their_probabilities(temperature, top_k):
    """20,000 draws against softmax(logits / temperature) over the most probable tokens: five standard deviations."""
    logits = jnp.array([2.0, -1.0, 1.5, 0.0, 1.0])
    expected = np.exp(np.asarray(logits, np.float64) / temperature)
    if top_k is not None:
        expected[np.argsort(logits)[:-top_k]] = 0
    expected /= expected.sum()
    choose = functools.partial(choose_token, logits, temperature=temperature, top_k=top_k)
    drawn = jax.vmap(choose)(jax.random.split(jax.random.key(0), 20_000))
    frequencies = np.bincount(drawn, minlength=5) / len(drawn)
    assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(drawn))).all()


def test_temperature_zero_takes_the_largest_whatever_the_key():
    logits = jnp.array([0.0, 3.0, 2.9])
    assert {int(choose_token(logits, jax.random.key(seed), 0, None)) for seed in range(5)} == {1}
