"""Heads that attend in pairs: the formula, what they see, and the original's numbers once its rotary positions are
given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_alone import LENGTH, WINDOW, check_by_formula, dependence, tokens_with_documents
from oracles import visible_pairs
from pieces_reference import largest_error, reference
from tiny import TINY, tiny_model

from senano_jax.attention import Intervals
from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.model import layer as layer_module
from senano_jax.model.config import check_model
from senano_jax.model.context import Context, Slots
from senano_jax.model.layer import Layer
from senano_jax.model.pieces import pieces_of
from senano_jax.model.rotary import rotary_tables
from senano_jax.presets import preset

CONFIG = tiny_model(num_heads=4, paired_heads=(1, 2), head_gate=True).config
LONG, SHORT = 2, 1  # layers


@pytest.mark.parametrize("layer", [LONG, SHORT])
def test_attention_is_that_of_the_formula(layer):
    check_by_formula(CONFIG, layer, tokens_with_documents(3, 100))


@pytest.mark.parametrize("layer", [LONG, SHORT])
def test_a_token_sees_the_tokens_of_as_many_slots_as_the_window_has(layer):
    """Half as many as in another layer, none of another document and none that comes later."""
    tokens = tokens_with_documents(70)
    positions = (0, 63, 64, 69, 70, 128, 191, 192, LENGTH - 1)
    seen = visible_pairs(tokens, {LONG: WINDOW, SHORT: WINDOW // 2}[layer], slots=2)
    of_tokens = seen.reshape(LENGTH, 2, LENGTH, 2).any((1, 3))
    np.testing.assert_array_equal(dependence(CONFIG, layer, tokens, positions), of_tokens[list(positions)])


def test_with_the_original_s_positions_it_is_the_original_function(monkeypatch):
    """There even heads have position 2t and odd ones 2t + 1. Of six heads, 0, 2, 3 and 5 have them here too: of lanes
    0 and 2 nothing has to be given."""
    tokens, padded, heads, width, second = 48, 64, 6, 16, 20
    inputs, arrays = reference("b_attn_paired")
    slot, head = np.arange(2 * padded)[:, None], np.arange(heads // 2) + 3 * (np.arange(2 * padded)[:, None] % 2)
    positions = 2 * (slot // 2) + head % 2
    np.testing.assert_array_equal(positions[:, [0, 2]], np.repeat(slot, 2, axis=1))
    rotary = tuple(table[positions, 0] for table in rotary_tables(2 * padded, width))

    slots = slot[:, 0]
    key_start = jnp.asarray(np.maximum(np.where(slots < 2 * second, 0, 2 * second), slots - 20), jnp.int32)[None]
    context = Context(None, None, (), None, {}, Slots(rotary, {False: Intervals(key_start, None)}))
    config = changed(TINY, {"dim": heads * width, "num_heads": heads, "paired_heads": (1,), "attention": "dense"})
    columns = np.arange(heads * width).reshape(heads, width)
    pairs_apart = columns[:, np.r_[0:width:2, 1:width:2]].ravel()  # the original's rotary pairs are neighbours
    q, k, v, out = (w.T for w in np.split(inputs["W"], 4))
    qkv = np.stack([q[:, pairs_apart], k[:, pairs_apart], v]) * inputs["lam"][0]
    attention = {"qkv": jnp.asarray(qkv), "out": jnp.asarray(out * inputs["lam"][1]), "value_residual": jnp.zeros(())}
    monkeypatch.setattr(layer_module, "ATTENTION_SCALE", 0.1)

    @jax.jit
    def attended(x):
        x = jnp.pad(x, ((0, padded - tokens), (0, 0)))[None]
        params = {"params": {"attention": attention}}
        return Layer(config, 1).apply(params, x, context, method=Layer.attend)[0][0, :tokens]

    value, pull_back = jax.vjp(attended, jnp.asarray(inputs["x"]))
    assert largest_error(value, arrays["y"]) < 2e-6
    assert largest_error(pull_back(jnp.asarray(inputs["gy"]))[0], arrays["d_x"]) < 1e-5


def test_key_offset_and_exclusive_attention_leave_it_alone():
    config = tiny_model(paired_heads=(1,), key_offset="all", exclusive_attention=True).config
    assert [config.offsets_keys(layer) for layer in (0, 1)] == [True, False]
    assert [len(pieces_of(config, layer)) for layer in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paired_heads": (12,)}, "--model.paired-heads names layer 12; there are layers 0 to 11"),
        ({"num_heads": 3}, "--model.paired-heads takes an even number of heads, --model.num-heads is 3; change"),
        (
            {"layers": LayerSchedule(3, 6, 4, 3, no_attention=(5,))},
            "--model.paired-heads names layer 5, which has no attention; leave it out",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_model(changed(preset("paired-heads").model, changes))
