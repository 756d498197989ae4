"""GPT-2: its parameters, its formula and gradients, and what a token can reach."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_gpt2 import loss_and_gradients
from oracles import END_OF_TEXT, relative_error
from tiny import random_params, random_sequences, tiny_gpt2

from senano_jax.interop.torch_checkpoint import to_torch
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.gpt2 import Gpt2
from senano_jax.presets import preset


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameter_count_and_types(dtype):
    """By shapes alone: 50,304 tokens and 1,024 positions of 768; in each of 12 layers twelve squares, their biases and
    two norms; a norm at the end. All float32, whatever the activations."""
    params = abstract_params(make_model(preset("llmc").model, dtype))
    layer = 12 * 768**2 + (3 + 1 + 4 + 1) * 768 + 2 * 2 * 768
    assert count_parameters(params) == 124_475_904 == (50_304 + 1024) * 768 + 12 * layer + 2 * 768
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_activations_have_the_type_of_the_run():
    """Each is computed from float32 weights; the loss is a float32 sum."""
    model = tiny_gpt2("bfloat16")
    tokens = jnp.zeros((1, 128), jnp.int32)
    variables = {"params": abstract_params(model)}
    features = jax.eval_shape(lambda v: model.apply(v, tokens, 1, method=Gpt2.features), variables)
    loss = jax.eval_shape(lambda v: model.apply(v, tokens, tokens, 1), variables)
    assert (features.dtype, loss.dtype) == (jnp.bfloat16, jnp.float32)


def test_initial_weights_have_the_published_statistics():
    """N(0, 0.02), what is added to the residual stream scaled by 1 / sqrt(2 layers); biases 0, gains 1; the rows that
    pad the table 0."""
    model = tiny_gpt2(dim=64, num_layers=3)
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]
    np.testing.assert_array_equal(params["embedding"][500:], 0)
    drawn = {"embedding": params["embedding"][:500], "position_embedding": params["position_embedding"]}
    for n in range(3):
        for part in ("attention", "mlp"):
            for name, dense in params[f"layer_{n}"][part].items():
                drawn[f"{n} {name}"] = dense["kernel"]
                np.testing.assert_array_equal(dense["bias"], 0)
        for norm in (params[f"layer_{n}"]["attention_norm"], params[f"layer_{n}"]["mlp_norm"], params["final_norm"]):
            np.testing.assert_array_equal(norm["scale"], 1)
            np.testing.assert_array_equal(norm["bias"], 0)
    assert len(drawn) == 2 + 3 * 4
    for name, matrix in drawn.items():
        std = 0.02 / math.sqrt(6) if name.endswith(("out", "down")) else 0.02
        assert float(matrix.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * matrix.size)), name
        assert float(matrix.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(matrix.size)), name


@pytest.fixture(scope="module")
def sequences():
    """int32 [2, 257]."""
    return random_sequences(2, 256, vocabulary=500)


def summed_loss(model, sequences):
    """Value and gradient by parameters, over a window that is the whole sequence."""
    return jax.jit(
        jax.value_and_grad(lambda params: model.apply({"params": params}, sequences[:, :-1], sequences[:, 1:], 2))
    )


def test_loss_and_gradients_are_those_of_the_formulas(sequences):
    """Against float64 NumPy with derivatives by hand, in every tensor: both uses of the one table add up, and the rows
    that pad it get no gradient."""
    model = tiny_gpt2()
    params = random_params(model)
    loss, gradients = summed_loss(model, sequences)(params)
    expected_loss, expected = loss_and_gradients(
        to_torch(params, model.config), sequences[:, :-1], sequences[:, 1:], num_heads=2, vocab_size=500
    )
    assert float(loss) / 512 == pytest.approx(expected_loss, rel=1e-6)
    ours = to_torch(gradients, model.config)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        if name.endswith("c_attn.bias"):  # a bias of all keys moves no weight of attention: zero, but for rounding
            gradient, expected[name] = np.delete(gradient, np.s_[32:64]), np.delete(expected[name], np.s_[32:64])
        assert relative_error(gradient / 512, expected[name]) < 1e-5, name
    np.testing.assert_array_equal(gradients["embedding"][500:], 0)


def test_recomputing_does_not_change_the_result(sequences):
    """Blocks whole or except their attention: the same loss and gradients up to rounding."""
    params = random_params(tiny_gpt2(num_layers=1))
    results = [summed_loss(tiny_gpt2(num_layers=1, remat=remat), sequences)(params) for remat in ("none", "attention")]
    for other, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(other, expected, rtol=1e-6, atol=5e-6 * np.linalg.norm(expected))


def test_attention_reaches_back_over_documents_and_not_ahead():
    """Derivatives of the features at token 200: by every position up to it not zero, whatever END_OF_TEXT lies between,
    and by those after it zero exactly."""
    model = tiny_gpt2(num_layers=1, vocab_size=50_257, padded_vocab_size=50_304)
    params = random_params(model)
    tokens = random_sequences(1, 255, vocabulary=50_256)
    tokens[0, [50, 128, 199]] = END_OF_TEXT
    cotangent = jax.random.normal(jax.random.key(0), (32,))

    @jax.jit
    @jax.grad
    def slopes(positions):
        variables = {"params": params | {"position_embedding": positions}}
        return model.apply(variables, tokens, 2, method=Gpt2.features)[0, 200] @ cotangent

    reached = jnp.abs(slopes(params["position_embedding"])).max(axis=1) > 0
    np.testing.assert_array_equal(reached, np.arange(256) <= 200)
