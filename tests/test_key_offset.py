"""Keys that tell of the token before theirs: the original's numbers, the formula, and what crosses a border."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_alone import LENGTH, check_by_formula, dependence, tokens_with_documents
from pieces_reference import reference
from tiny import tiny_model

from senano_jax.model.pieces.key_offset import offset_keys

CONFIG = tiny_model(key_offset="long").config
LONG = 0  # a layer with the long window


def test_it_is_the_original_function():
    """Keys and gradient, to the bit."""
    inputs, arrays = reference("b_key_offset")
    k, g = (jnp.asarray(inputs[name])[None] for name in ("k", "g"))
    offset, pull_back = jax.vjp(offset_keys, k)
    np.testing.assert_array_equal(offset[0], arrays["out_half"])
    np.testing.assert_array_equal(pull_back(g)[0][0], arrays["d_k_half"])


def test_attention_is_that_of_the_formula():
    check_by_formula(CONFIG, LONG, tokens_with_documents(3, 100))


def test_only_the_key_of_a_document_s_first_token_sees_another_document():
    """So that attention in the second document depends on the last token of the first one, and on no other. Its first
    token sees its own key alone, which weighs 1 whatever it is: a dependence there is rounding, on some machines.
    """
    start, index = 100, np.arange(LENGTH)
    positions = (0, start - 1, start + 1, 200, LENGTH - 1)
    depends = dependence(CONFIG, LONG, tokens_with_documents(start), positions)
    for position, found in zip(positions, depends, strict=True):
        own = (index <= position) & ((index < start) == (position < start))
        np.testing.assert_array_equal(found, own | ((index == start - 1) & (position >= start)))


@pytest.mark.parametrize(("key_offset", "layers"), [("none", []), ("long", [0, 2]), ("all", [0, 1, 2, 3])])
def test_the_layers_are_those_of_the_flag(key_offset, layers):
    config = tiny_model(key_offset=key_offset).config
    assert [layer for layer in range(4) if config.offsets_keys(layer)] == layers
