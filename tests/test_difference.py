"""The difference of two attentions over the same keys and values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_alone import attention, check_by_formula, random_inputs, tokens_with_documents
from tiny import tiny_model

from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.model.config import check_model
from senano_jax.model.pieces.difference import Difference
from senano_jax.presets import preset

SCHEDULE = LayerSchedule(1, 2, 2, 1)


@pytest.mark.parametrize("pieces", [{}, {"exclusive_attention": True, "head_gate": True, "key_offset": "all"}])
def test_it_is_the_formula(pieces):
    """Of a layer of the loop at its second visit, with gates by visit, and before the pieces that follow."""
    config = tiny_model(difference=(1,), layers=SCHEDULE, **pieces).config
    check_by_formula(config, 1, tokens_with_documents(100), visit=1)


def test_second_queries_like_the_first_take_off_the_share_of_the_output():
    config = tiny_model(difference=(1,), layers=SCHEDULE).config
    inputs, tokens = random_inputs(config, 1), tokens_with_documents(100)
    heads = config.num_heads
    queries = jnp.stack(jnp.split(inputs.params["qkv"][0], heads, axis=1))
    both = inputs.params | {"difference": {"queries": queries, "gate": jnp.zeros((2, heads, 12))}}
    halved, v = attention(config, 1, tokens, inputs._replace(params=both))
    plain = tiny_model(layers=SCHEDULE).config
    whole, plain_v = attention(plain, 1, tokens, inputs)
    np.testing.assert_allclose(2 * halved, whole, atol=1e-5 * float(jnp.abs(whole).max()))
    np.testing.assert_allclose(v, plain_v, atol=1e-6)


def test_the_other_visits_have_no_gradient_and_the_type_is_kept():
    both, x = jnp.ones((1, 4, 4, 8), jnp.bfloat16), jnp.ones((1, 4, 16), jnp.bfloat16)
    module = Difference(3, 2, 16)
    params = module.init(jax.random.key(0), both, x, 1, method=Difference.of_both)["params"]
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in params.items()} == {
        "queries": ((2, 16, 8), jnp.float32),
        "gate": ((3, 2, 12), jnp.float32),
    }

    def difference(gate):
        return module.apply({"params": params | {"gate": gate}}, both, x, 1, method=Difference.of_both)

    assert difference(params["gate"]).dtype == jnp.bfloat16
    np.testing.assert_array_equal(difference(params["gate"]), 0.5)
    slopes = jax.grad(lambda gate: difference(gate).astype(jnp.float32).sum())(params["gate"])
    assert (slopes[1] != 0).all()
    np.testing.assert_array_equal(np.delete(slopes, 1, axis=0), 0)


def test_the_other_layers_are_as_they_are():
    model, tokens = tiny_model(difference=(0, 2), layers=SCHEDULE), jnp.zeros((1, 128), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens, 1)["params"])
    paths = (jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params))
    assert {re.search(r"layer_\d", path)[0] for path in paths if "difference" in path} == {"layer_0", "layer_2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.difference": (12,)}, "--model.difference names layer 12; there are layers 0 to 11"),
        (
            {"model.difference": (5,), "model.layers.no_attention": (5,)},
            "--model.difference names layer 5, which has no attention; leave it out",
        ),
        (
            {"model.difference": (4, 5), "model.paired_heads": (1, 5)},
            "--model.difference and --model.paired-heads name layer 5; leave it out of one of them",
        ),
        (
            {"model.difference": (5,), "model.value_embeddings": 1},
            "--model.difference does not go with --model.value-embeddings; leave out one of them",
        ),
        (
            {"model.difference": (5,), "model.dim": 8, "model.num_heads": 1},
            "--model.difference reads 12 channels, --model.dim is 8; widen it",
        ),
    ],
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        check_model(changed(preset("strict"), changes).model)
