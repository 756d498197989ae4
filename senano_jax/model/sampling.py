"""Tokens drawn from the model, one after another.

Each token costs a forward pass over the whole sequence, padded to one length so that a single program is compiled. In
exchange it is the model's own `logits` that is sampled, with any schedule and any attention: keys and values kept from
token to token would need a second forward pass beside the model's (every position of the schedule keeps its own,
however often a layer is visited). A GPU computes a thousand tokens in milliseconds; a CPU is quick for narrow models
only.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from senano_jax.attention import BLOCK
from senano_jax.model.gpt import Gpt
from senano_jax.model.gpt2 import Gpt2


def choose_token(logits: Float[Array, "V"], key: PRNGKeyArray, temperature: float, top_k: int | None) -> Int[Array, ""]:
    """A token from softmax(logits / temperature), over the `top_k` most probable ones if given; the most probable one
    at temperature 0."""
    if temperature == 0:
        return jnp.argmax(logits)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature)
    largest, tokens = jax.lax.top_k(logits, top_k)
    return tokens[jax.random.categorical(key, largest / temperature)]


@functools.partial(jax.jit, static_argnames=("model", "temperature", "top_k"))
def next_token(
    model: Gpt | Gpt2,
    params,
    tokens: Int[Array, "1 T"],
    position: Int[Array, ""] | int,
    window_blocks: Int[Array, ""] | int,
    key: PRNGKeyArray,
    temperature: float,
    top_k: int | None,
) -> tuple[Int[Array, "1 T"], Int[Array, ""]]:
    """The token that follows the one at `position`, and `tokens` with it filled in; later ones do not matter.

    The head's padding columns are never chosen.
    """
    logits_1V = model.apply({"params": params}, tokens, window_blocks, position, method=model.logits)
    key = jax.random.fold_in(key, position)
    token = choose_token(logits_1V[0, : model.config.vocab_size], key, temperature, top_k)
    return tokens.at[0, position + 1].set(token), token


def generate(
    model: Gpt | Gpt2,
    params,
    prompt: Sequence[int],
    count: int,
    window_blocks: int,
    key: PRNGKeyArray,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[int]:
    """Yields `count` tokens that follow `prompt`, each as soon as it is known.

    The sequence is computed at len(prompt) + count tokens, rounded up to a block: equal lengths share a compilation.
    """
    length = -(-(len(prompt) + count) // BLOCK) * BLOCK
    tokens_1T = jnp.zeros((1, length), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    for position in range(len(prompt) - 1, len(prompt) - 1 + count):
        tokens_1T, token = next_token(model, params, tokens_1T, position, window_blocks, key, temperature, top_k)
        yield int(token)
