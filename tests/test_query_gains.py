"""Queries with a gain for each head and visit: the formula, with and without pairs of heads, and the start."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_alone import check_by_formula, tokens_with_documents
from tiny import tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.model.build import abstract_params
from senano_jax.model.pieces.query_gains import with_gains


def test_attention_is_that_of_the_formula():
    """In the second visit of a layer of the loop."""
    config = tiny_model(query_gains=True, layers=LayerSchedule(1, 2, 2, 1)).config
    check_by_formula(config, 1, tokens_with_documents(100), visit=1)


def test_heads_keep_their_gains_in_slots():
    config = tiny_model(query_gains=True, num_heads=2, paired_heads=(1,)).config
    check_by_formula(config, 1, tokens_with_documents(100))


def test_gains_are_by_visit_and_change_nothing_at_the_start():
    params = abstract_params(tiny_model(query_gains=True, layers=LayerSchedule(1, 2, 4, 1)))
    shapes = [params["layer_0"], params["loop"]["layer_1"]]
    assert [layer["attention"]["query_gains"].shape for layer in shapes] == [(1, 2), (4, 2)]
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8), jnp.bfloat16)
    same = with_gains(q, jnp.ones(2))
    assert same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(same, q)
