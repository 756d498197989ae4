"""FLOPs and visible pairs against those counted in the program or pair by pair."""

import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_gpt2, tiny_model

from senano_jax.attention import END_OF_TEXT
from senano_jax.config import LayerSchedule
from senano_jax.model.build import abstract_params
from senano_jax.presets import preset
from senano_jax.profiling.flops import (
    attention_flops_per_pair,
    matrix_flops_per_token,
    peak_flops,
    step_flops,
    visible_pairs,
)
from senano_jax.profiling.tokens import synthetic_sequences


def dot_flops(jaxpr, turns: int = 1) -> int:
    """FLOPs of all dot_general equations, those of a scan once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        inner_turns = turns * equation.params.get("length", 1) if equation.primitive.name == "scan" else turns
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * turns * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += dot_flops(inner, inner_turns)
    return total


DENSE = {"attention": "dense", "mlp_expansion": 3}


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(**DENSE, layers=LayerSchedule(1, 2, 2, 1)),
        tiny_model(**DENSE, layers=LayerSchedule(2, 2, 4, 2)),
        tiny_model(**DENSE, layers=LayerSchedule(3, 0, 0, 3)),
        tiny_model(**DENSE, layers=LayerSchedule(2, 0, 0, 2, no_attention=(2,)), value_embeddings=1),
        tiny_gpt2(**DENSE),
    ],
)
def test_forward_flops_are_those_of_the_products_in_the_program(model):
    """Dense attention computes every pair, so that its products can be counted too."""
    B, T = 2, 256
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(params, tokens):
        return model.apply({"params": params}, tokens, tokens, 2)

    counted = dot_flops(jax.make_jaxpr(forward)(abstract_params(model), tokens).jaxpr)
    c = model.config
    every_pair = len(c.attention_windows) * attention_flops_per_pair(c) * B * T * T
    assert counted == matrix_flops_per_token(c) * B * T + every_pair


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
