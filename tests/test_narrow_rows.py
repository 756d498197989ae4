"""A tied table with narrow rows for later tokens: against a whole table in float64, and within a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_params, random_sequences, tiny_model

from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, make_model
from senano_jax.model.config import check_model
from senano_jax.model.pieces.narrow_rows import band_shapes, with_narrow_rows
from senano_jax.optim.groups import parameter_group
from senano_jax.presets import preset

BANDS = ((200, 16), (400, 4))  # of 640 columns, 32 wide
ENDS = (400, 640)
TIED = dataclasses.replace(TINY, tied=True)


def assembled(params) -> np.ndarray:
    """The whole head [32, 640] in float64, number by number."""
    whole = np.zeros((32, 640))
    whole[:, :200] = params["head"]
    for number, ((first, width), end) in enumerate(zip(BANDS, ENDS)):
        scale = (32 / width) ** 0.5
        for column in range(first, end):
            for row in range(width):
                whole[row, column] = scale * params[f"narrow_head_{number}"][row, column - first]
    return whole


def test_values_and_gradients_are_those_of_the_table_assembled_by_hand():
    rng = np.random.default_rng(0)
    params = {
        "head": rng.standard_normal((32, 200)),
        "narrow_head_0": rng.standard_normal((16, 200)),
        "narrow_head_1": rng.standard_normal((4, 240)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    def whole(params):
        return with_narrow_rows(params["head"], [params["narrow_head_0"], params["narrow_head_1"]])

    assert list(band_shapes(BANDS, 640)) == [(16, 200), (4, 240)]
    found, pull_back = jax.vjp(whole, params)
    np.testing.assert_allclose(found, assembled(params), rtol=1e-6)
    pulled = rng.standard_normal((32, 640)).astype(np.float32)
    (gradients,) = pull_back(pulled)
    np.testing.assert_array_equal(gradients["head"], pulled[:, :200])
    np.testing.assert_allclose(gradients["narrow_head_0"], 2**0.5 * pulled[:16, 200:400], rtol=1e-6)
    np.testing.assert_allclose(gradients["narrow_head_1"], 8**0.5 * pulled[:4, 400:], rtol=1e-6)


def test_a_model_with_them_is_the_one_that_has_their_table():
    """Losses, logits, and the gradient of what both have."""
    narrow, plain = tiny_model(tied=True, narrow_rows=BANDS), tiny_model(tied=True)
    params = random_params(narrow)
    layers = {name: leaf for name, leaf in params.items() if "head" not in name}
    table = jnp.asarray(assembled(params), jnp.float32)
    tokens = random_sequences(1, 128, vocabulary=512)
    assert (tokens >= 400).any() and (tokens < 200).any()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda params: model.apply({"params": params}, inputs, targets, 1)))

    (found, gradients), (expected, wanted) = loss(narrow)(params), loss(plain)(layers | {"head": table})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    d_bands = [gradients.pop(name) for name in ("head", "narrow_head_0", "narrow_head_1")]
    d_table = wanted.pop("head")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), gradients, wanted)
    d_expected = d_table[:, :200], 2**0.5 * d_table[:16, 200:400], 8**0.5 * d_table[:4, 400:]
    for found_band, expected_band in zip(d_bands, d_expected, strict=True):
        np.testing.assert_allclose(found_band, expected_band, rtol=1e-3, atol=1e-4)
    logits = [
        model.apply({"params": p}, inputs, 1, method="logits")
        for model, p in ((narrow, params), (plain, layers | {"head": table}))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_columns_have_one_norm_at_the_start_and_all_else_its_weights():
    inputs = jnp.arange(128)[None]
    drawn = {}
    for rows in ((), BANDS):
        model = make_model(dataclasses.replace(TIED, narrow_rows=rows), "float32")
        drawn[rows] = model.init(jax.random.key(3), inputs, inputs, 1)["params"]
    norms = np.linalg.norm(assembled(drawn[BANDS]), axis=0)
    for start, end in ((0, 200), (200, 400), (400, 640)):
        assert np.sqrt(np.mean(norms[start:end] ** 2)) == pytest.approx(0.005 * 32**0.5, rel=0.05)
    others = [{k: x for k, x in params.items() if "head" not in k} for params in drawn.values()]
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_the_heads_rule_updates_them():
    shapes = abstract_params(make_model(dataclasses.replace(TIED, narrow_rows=BANDS), "float32"))
    of_head = {path[-1].key for path, _ in jax.tree.leaves_with_path(shapes) if parameter_group(path) == "head"}
    assert of_head == {"head", "narrow_head_0", "narrow_head_1"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"narrow_rows": ((9, 8),)}, r"--model\.narrow-rows needs one table for embedding and head; use --model\.tied"),
        ({"tied": True, "narrow_rows": ((0, 8),)}, "a band from token 0; use 1 to 50256"),
        ({"tied": True, "narrow_rows": ((50257, 8),)}, "a band from token 50257; use 1 to 50256"),
        (
            {"tied": True, "narrow_rows": ((9, 8), (9, 4))},
            "a band from token 9 after one from 9; order them, each once",
        ),
        ({"tied": True, "narrow_rows": ((9, 32),)}, "a band of width 32; use 1 to 31"),
        ({"tied": True, "narrow_rows": ((9, 0),)}, "a band of width 0; use 1 to 31"),
    ],
    ids=str,
)
def test_bands_that_cannot_be_are_refused(change, line):
    with pytest.raises(UserError, match=line):
        check_model(dataclasses.replace(preset("demo").model, dim=32, num_heads=2, **change))


def test_the_preset_has_more_layers_within_the_limit():
    """The candidate's own table and as many layers would not be."""
    model = preset("narrow-rows").model
    whole = dataclasses.replace(model, narrow_rows=())
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(abstract_params(make_model(m, "bfloat16")))) for m in (model, whole)
    ]
    assert counts[0] <= 162_000_000 < counts[1]
    assert model.layers.layers == 20
