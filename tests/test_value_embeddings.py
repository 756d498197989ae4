"""The system with value embeddings against float64 NumPy with derivatives by hand."""

import jax
import numpy as np
import pytest
from oracle_value_embeddings import loss_and_gradients
from oracles import random_tokens, relative_error
from tiny import random_params, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.interop.torch_checkpoint import to_torch
from senano_jax.presets import preset

LENGTH = 512
# Six layers in place of twelve: two tables, at both ends, and a layer between them without attention.
LAYERS = LayerSchedule(prelude=3, loop=0, visits=0, coda=3, long_windows=(0, 2, 5), no_attention=(3,))
TABLES = {0: 0, 1: 1, 4: 0, 5: 1}


def test_the_preset_has_the_published_pattern():
    """Three tables, for the layers 0, 1, 2 and again 9, 10, 11; attention everywhere but in layer 7; long windows in 0,
    4 and 11, where layer 7 would have had one."""
    model = preset("value-embeddings").model
    assert [model.value_table(n) for n in range(12)] == [0, 1, 2, *[None] * 6, 0, 1, 2]
    assert [n for n in range(12) if model.layers.has_long_window(n)] == [0, 4, 7, 11]
    attending = [n for n in range(12) if n != 7]
    assert model.attention_windows == tuple(n in (0, 4, 11) for n in attending)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS, value_embeddings=2, vocab_size=50_257, padded_vocab_size=384)


@pytest.fixture(scope="module")
def summed_loss(model):
    """A compiled (params, inputs, targets, window) -> loss and its gradients."""
    return jax.jit(
        jax.value_and_grad(lambda params, *arguments: model.apply({"params": params}, *arguments)),
    )


@pytest.mark.parametrize("window_blocks", [1, 3])
def test_loss_and_gradients_are_those_of_the_formulas(model, summed_loss, window_blocks):
    """In every tensor, for several documents: tables used at both ends, lambdas of layers with and without one, windows
    by layer, skips over a layer that is an MLP alone."""
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, LENGTH, 0.008), rng.integers(0, 384, LENGTH)
    params = random_params(model)
    loss, gradients = summed_loss(params, inputs[None], targets[None], window_blocks)
    expected_loss, expected = loss_and_gradients(
        to_torch(params, model.config),
        inputs,
        targets,
        window_blocks,
        num_heads=2,
        num_layers=6,
        tables=TABLES,
        long=LAYERS.long_windows,
        no_attention=LAYERS.no_attention,
    )
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    ours = to_torch(gradients, model.config)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name
