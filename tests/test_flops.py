"""FLOPs and visible pairs against those counted in the program or pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_gpt2, tiny_model

from senano_jax.attention import END_OF_TEXT
from senano_jax.config import LayerSchedule
from senano_jax.model.schedule import Weighted
from senano_jax.presets import preset
from senano_jax.profiling.flops import (
    attention_flops_per_pair,
    matrix_flops_per_token,
    peak_flops,
    product_flops,
    step_flops,
    visible_pairs,
)
from senano_jax.profiling.tokens import synthetic_sequences


def by_formula(model) -> int:
    """Forward FLOPs of one token: qkv, output and MLP at every application, and the head."""
    squares = 4 * len(model.attention_windows) + 2 * model.mlp_expansion * model.positions
    return 2 * squares * model.dim**2 + 2 * model.dim * model.padded_vocab_size


def test_products_are_counted_wherever_they_are():
    """In a scan once a turn; under jit, remat and a function with a derivative of its own once."""

    @jax.custom_vjp
    def own_derivative(x):
        return x @ x

    own_derivative.defvjp(lambda x: (x @ x, x), lambda x, dy: (dy,))

    def program(x):
        x, _ = jax.lax.scan(lambda carry, _: (jax.checkpoint(lambda c: c @ c)(carry), None), x, length=5)
        x = own_derivative(jax.jit(lambda x: x @ x)(x))
        return jnp.einsum("ij,kj->ik", x, jnp.ones((3, 4)))

    square = 2 * 4**3
    assert product_flops(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr) == (5 + 1 + 1) * square + 2 * 4 * 4 * 3


TINY_MODELS = [
    TINY,
    tiny_model(mlp_expansion=3, layers=LayerSchedule(2, 2, 4, 2)).config,
    tiny_model(layers=LayerSchedule(3, 0, 0, 3), remat="full").config,
    tiny_model(layers=LayerSchedule(2, 0, 0, 2, no_attention=(2,)), value_embeddings=1).config,
    tiny_model(trunk=Weighted(), layers=LayerSchedule(1, 3, 3, 2)).config,
    tiny_gpt2(mlp_expansion=3).config,
]
RECORDED = ["recurrent", "no-value-embeddings", "value-embeddings", "llmc", "demo"]


@pytest.mark.parametrize("model", [*TINY_MODELS, *(preset(name).model for name in RECORDED)])
def test_forward_flops_are_those_of_the_formula(model):
    assert matrix_flops_per_token(model) == by_formula(model)


def test_what_a_piece_computes_is_counted():
    """A gate of 12 inputs for each of two heads, at six applications; and a narrower MLP."""
    gated = tiny_model(head_gate=True).config
    assert matrix_flops_per_token(gated) == by_formula(TINY) + 6 * 2 * 12 * 2
    narrow = tiny_model(mlp_widths=((3, 64),)).config
    assert matrix_flops_per_token(narrow) == by_formula(TINY) - 2 * 2 * 32 * 64


def test_heads_in_pairs_are_counted_over_their_slots():
    """The products stay what they are; half as many heads have pairs of slots, and the window counts these."""
    paired = tiny_model(paired_heads=(0, 1)).config
    assert matrix_flops_per_token(paired) == by_formula(TINY)
    tokens = np.ones((1, 512), np.int32)
    tokens[0, 201] = END_OF_TEXT
    document, index = np.repeat(np.cumsum(tokens[0] == END_OF_TEXT), 2), np.arange(1024)
    seen = (document[:, None] == document) & (index <= index[:, None])
    long, short = (int((seen & (index[:, None] // 128 - index // 128 < window)).sum()) for window in (4, 2))
    others = 2 * visible_pairs(tokens, 4) + visible_pairs(tokens, 2)
    expected = 4 * 32 * others + 4 * 16 * (long + 2 * short)
    assert step_flops(paired, tokens, 4, training=False).attention == expected


def test_a_second_attention_is_counted_without_what_the_program_makes_again():
    """In one application of six: queries and a gate more, and its pairs twice."""
    difference = tiny_model(difference=(0,)).config
    assert matrix_flops_per_token(difference) == by_formula(TINY) + 2 * 32 * 32 + 2 * 12 * 2
    tokens = synthetic_sequences(1, 512, 512)
    plain, taken = (step_flops(model, tokens, 4, training=False).attention for model in (TINY, difference))
    assert taken - plain == 4 * 32 * visible_pairs(tokens, 4)  # the first layer has the long window


def test_visible_pairs_are_those_of_the_rule_stated_pair_by_pair():
    tokens = np.ones((2, 640), np.int32)
    tokens[0, [5, 200, 201, 500]] = END_OF_TEXT
    tokens[1, 130] = END_OF_TEXT
    for window in (0, 1, 3):
        expected = 0
        for row in tokens:
            document = np.cumsum(row == END_OF_TEXT)
            q, k = np.meshgrid(np.arange(640), np.arange(640), indexing="ij")
            near = q // 128 - k // 128 < max(window, 1)
            expected += int(((k <= q) & near & (document[q] == document[k])).sum())
        assert visible_pairs(tokens, window) == expected


def test_a_step_counts_both_windows_and_three_passes():
    tokens = synthetic_sequences(2, 1024, 512)
    flops = step_flops(TINY, tokens, 4)
    assert flops.matrix_products == 3 * 2048 * matrix_flops_per_token(TINY)
    pairs = 3 * visible_pairs(tokens, 4) + 3 * visible_pairs(tokens, 2)  # six positions, every other one long
    assert flops.attention == 3 * attention_flops_per_pair(TINY) * pairs
    assert flops.total == 3 * step_flops(TINY, tokens, 4, training=False).total


def test_the_windows_of_other_systems_are_counted_as_they_are():
    """Value embeddings: three long windows, of layers 0, 4 and 11, and eight short ones. GPT-2: in every layer half of
    all pairs, documents or not."""
    tokens = synthetic_sequences(2, 1024, 50_257)
    long, short = visible_pairs(tokens, 4), visible_pairs(tokens, 2)
    model = preset("value-embeddings").model
    assert step_flops(model, tokens, 4, training=False).attention == 4 * 768 * (3 * long + 8 * short)
    causal = 12 * 2 * 1024 * 1025 // 2
    assert step_flops(preset("llmc").model, tokens, 8, training=False).attention == 4 * 768 * causal


def test_the_record_takes_one_and_a_half_gigaflop_a_token():
    assert 3 * matrix_flops_per_token(preset("recurrent").model) == pytest.approx(1.51e9, rel=0.005)


def test_peaks_are_known_by_device_and_only_in_bfloat16():
    assert peak_flops("NVIDIA H200", "bfloat16") == peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA H200", "float32") is None and peak_flops("cpu", "bfloat16") is None
