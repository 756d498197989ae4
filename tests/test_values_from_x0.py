"""Values that the embedding adds to: in one attention, and in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_alone import check_by_formula, tokens_with_documents
from tiny import TINY, random_params, random_sequences, tiny_model

from senano_jax.attention import document_start, window_intervals
from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.config import check_model
from senano_jax.model.context import Context
from senano_jax.model.layer import Layer
from senano_jax.model.rotary import rotary_tables
from senano_jax.presets import preset


@pytest.mark.parametrize("paired_heads", [(), (1,)], ids=["alone", "paired"])
def test_attention_is_that_of_the_formula(paired_heads):
    config = tiny_model(num_heads=4, paired_heads=paired_heads, values_from_x0=(1,)).config
    check_by_formula(config, 1, tokens_with_documents(100))


def test_they_are_own_values_where_value_embeddings_are_mixed_in():
    """With the weight of the layer's own values, in bfloat16 too."""
    config = changed(TINY, {"value_embeddings": 1, "values_from_x0": (3, 0), "layers": LayerSchedule(1, 0, 0, 3)})
    rng, heads = np.random.default_rng(0), (1, 128, 2, 16)
    table, values, x = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in (heads, heads, (1, 128, 32)))
    tokens = jnp.ones((1, 128), jnp.int32)
    starts = document_start(tokens)
    windows = {True: window_intervals(starts, 1)}
    context = Context(x, None, (table,), rotary_tables(128, 16), windows)
    context = context._replace(x0_values=(jnp.zeros_like(values), values))
    layer = Layer(config, 0)
    params = jax.jit(lambda: layer.init(jax.random.key(0), x, context, method=Layer.attend))()["params"]
    params["attention"]["value_lambdas"] = jnp.array([0.25, 0.5])
    with_them, without = (
        layer.apply({"params": params}, x, context._replace(x0_values=given), method=Layer.attend)[1]
        for given in (context.x0_values, (values, jnp.zeros_like(values)))
    )
    assert with_them.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(with_them) - without, 0.25 * jnp.float32(values), atol=0.02)


def test_a_matrix_for_the_first_layer_adds_to_its_matrix_of_values():
    """There the stream is the embedding. A matrix of zeros, as all are at the start, changes nothing."""
    plain, model = tiny_model(), tiny_model(values_from_x0=(0,))
    params = random_params(plain)
    params = params | {"layer_0": params["layer_0"] | {"lambdas": jnp.array([1.0, 0.0])}}
    matrix = jax.random.normal(jax.random.key(0), (32, 32))
    attention = params["layer_0"]["attention"]
    attention = attention | {"qkv": attention["qkv"].at[2].add(matrix)}
    merged = params | {"layer_0": params["layer_0"] | {"attention": attention}}
    sequences = random_sequences(2, 128)

    def loss(model, params):
        return float(jax.jit(model.apply)({"params": params}, sequences[:, :-1], sequences[:, 1:], 1))

    assert loss(model, params | {"x0_values_0": jnp.zeros((32, 32))}) == pytest.approx(loss(plain, params), rel=1e-6)
    expected = loss(plain, merged)
    assert loss(model, params | {"x0_values_0": matrix}) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(loss(plain, params), rel=1e-4)


def test_the_preset_keeps_the_strict_limit_of_parameters():
    config = preset("values-from-x0")
    params = abstract_params(make_model(config.model, config.dtype))
    assert params["x0_values_10"].shape == (768, 768)
    assert 161_900_000 < count_parameters(params) <= 162_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values_from_x0": (1, 12)}, "--model.values-from-x0 names layer 12; there are layers 0 to 11"),
        ({"values_from_x0": (1, 5, 1)}, "--model.values-from-x0 names layer 1 more than once; name it once"),
        (
            {"layers": LayerSchedule(3, 6, 4, 3, no_attention=(10,))},
            "--model.values-from-x0 names layer 10, which has no attention; leave it out",
        ),
    ],
)
def test_layers_that_cannot_have_them_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_model(changed(preset("values-from-x0").model, changes))
