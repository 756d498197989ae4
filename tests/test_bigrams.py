"""The table of pairs of tokens: rows against the original's, sums against NumPy, and documents that stay apart."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces_reference import reference
from tiny import TINY, random_params, tiny_model

from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, make_model
from senano_jax.model.config import check_model
from senano_jax.model.pieces.bigrams import Bigrams, row_numbers, sign_bits, sign_numbers, signs_of
from senano_jax.optim.groups import parameter_group
from senano_jax.presets import preset

ROWS, WIDTH, DIM = 97, 6, 10
TOKENS = np.array([[7, 3, 3, END_OF_TEXT, 3, 7, 3], [50256, 1, 2, 3, 1, 2, 3]])


def row_by_hand(tokens, place: int, rows: int) -> int:
    if place == 0 or tokens[place] == END_OF_TEXT:
        return rows - 1
    return ((36313 * int(tokens[place])) ^ (27191 * int(tokens[place - 1]))) % (rows - 1)


@pytest.mark.parametrize("rows", [15801, 251520, 377280])
def test_rows_are_the_originals(rows):
    """But for the second token, before which the original puts the number of the last row."""
    tokens, arrays = original()
    np.testing.assert_array_equal(np.delete(row_numbers(tokens, rows), 1), np.delete(arrays[f"row_{rows}"], 1))


def test_rows_of_signs_are_the_originals():
    """But for the first token, for which the original takes row 0."""
    tokens, arrays = original()
    np.testing.assert_array_equal(np.delete(sign_numbers(tokens), 0), np.delete(arrays["sign_row"], 0))


def original() -> tuple[jax.Array, dict[str, np.ndarray]]:
    inputs, arrays = reference("e_bigram")
    tokens = inputs["tokens"]
    assert END_OF_TEXT not in tokens and tokens.max() > 50_000
    return jnp.asarray(tokens, jnp.int32)[None], arrays


def test_signs_never_change():
    """No checkpoint holds them."""
    assert zlib.crc32(sign_bits(256).tobytes()) == 3223233952
    bits = sign_bits(12)[sign_numbers(jnp.asarray(TOKENS))]
    expected = [
        [[1 - 2 * ((row[d // 8] >> (d % 8)) & 1) for d in range(12)] for row in part] for part in bits.astype(int)
    ]
    np.testing.assert_array_equal(signs_of(jnp.asarray(TOKENS), 12), expected)


def test_values_and_gradients_agree_with_numpy_in_float64():
    """The same pair has one row wherever it stands; rows are added behind the first dimensions."""
    rng = np.random.default_rng(0)
    rows, table, pulled = (rng.standard_normal(shape) for shape in ((2, 7, DIM), (ROWS, WIDTH), (2, 7, DIM)))
    signs = np.asarray(signs_of(jnp.asarray(TOKENS), WIDTH), np.float64)
    assert set(signs.ravel()) == {-1.0, 1.0}
    expected, d_table = rows.copy(), np.zeros_like(table)
    for sequence in range(2):
        for place in range(7):
            row = row_by_hand(TOKENS[sequence], place, ROWS)
            expected[sequence, place, DIM - WIDTH :] += signs[sequence, place] * table[row]
            d_table[row] += signs[sequence, place] * pulled[sequence, place, DIM - WIDTH :]

    def added(rows, table):
        return Bigrams(ROWS, WIDTH).apply({"params": {"bigram_table": table}}, rows, jnp.asarray(TOKENS))

    out, pull_back = jax.vjp(added, *(jnp.asarray(x, jnp.float32) for x in (rows, table)))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    d_rows, found = pull_back(jnp.asarray(pulled, jnp.float32))
    np.testing.assert_allclose(d_rows, pulled, atol=1e-6)
    np.testing.assert_allclose(found, d_table, atol=1e-5)
    np.testing.assert_array_equal(signs[1, 2:4], signs[1, 5:7])  # 1 2, 2 3 twice
    assert (signs[0, 1] != signs[0, 2]).any()  # 7 3, 3 3


def test_pairs_that_share_a_row_differ_in_half_of_their_signs():
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 50256, (1, 4000)), jnp.int32)
    rows, signs = np.asarray(row_numbers(tokens, 40))[0, 1:], np.asarray(signs_of(tokens, 256))[0, 1:]
    shared = [signs[rows == row] for row in range(39)]
    agreement = [np.mean(group[0] == other) for group in shared for other in group[1:]]
    assert len(agreement) > 3000
    assert np.mean(agreement) == pytest.approx(0.5, abs=0.01)
    assert np.std(agreement) < 0.05


def test_a_document_does_not_tell_which_token_was_before_it():
    """Nor does a pair depend on anything else than its two tokens."""
    one = jnp.asarray([[5, 6, END_OF_TEXT, 8, 9]])
    other = jnp.asarray([[4, 1, END_OF_TEXT, 8, 9]])
    np.testing.assert_array_equal(row_numbers(one, ROWS)[0, 2:], row_numbers(other, ROWS)[0, 2:])
    table = jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, WIDTH)), jnp.float32)
    out = [
        Bigrams(ROWS, WIDTH).apply({"params": {"bigram_table": table}}, jnp.zeros((1, 5, DIM)), x) for x in (one, other)
    ]
    np.testing.assert_array_equal(out[0][0, 2:], out[1][0, 2:])
    assert (out[0][0, 1] != out[1][0, 1]).any()


def test_a_model_reads_the_table_through_its_embedding():
    """The loss is that of the model without pairs whose tokens' rows are changed by hand: here each token comes once,
    so that it has one pair."""
    tokens = jnp.asarray(np.random.default_rng(3).permutation(512)[None, :129], jnp.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with_pairs, plain = tiny_model(bigram_rows=ROWS, bigram_width=8), tiny_model()
    params = random_params(with_pairs)
    others = {name: leaf for name, leaf in params.items() if name != "bigram_table"}
    added = signs_of(inputs, 8)[0] * params["bigram_table"][row_numbers(inputs, ROWS)[0]]
    embedding = params["embedding"].at[inputs[0], 24:].add(added)

    @jax.jit
    def loss_and_gradient(table):
        return jax.value_and_grad(
            lambda table: with_pairs.apply({"params": others | {"bigram_table": table}}, inputs, targets, 1)
        )(table)

    found, gradient = loss_and_gradient(params["bigram_table"])
    expected = plain.apply({"params": others | {"embedding": embedding}}, inputs, targets, 1)
    without = plain.apply({"params": others}, inputs, targets, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(found - without) > 1e-3 * abs(without)
    assert np.asarray(gradient).any(axis=1).sum() == len(np.unique(row_numbers(inputs, ROWS)))


def test_at_the_start_it_changes_nothing():
    inputs = jnp.arange(128)[None]
    losses, params = {}, {}
    for rows in (0, ROWS):
        model = make_model(dataclasses.replace(TINY, tied=True, bigram_rows=rows, bigram_width=8), "float32")
        variables = model.init(jax.random.key(3), inputs, inputs, 1)
        params[rows], losses[rows] = variables["params"], model.apply(variables, inputs, inputs, 1)
    table = params[ROWS].pop("bigram_table")
    jax.tree.map(np.testing.assert_array_equal, params[0], params[ROWS])
    assert losses[0] == losses[ROWS]
    assert table.shape == (ROWS, 8) and not table.any()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bigram_rows": -1}, r"--model\.bigram-rows is -1; use 0, for none, or 2 and more"),
        ({"bigram_rows": 1}, r"--model\.bigram-rows is 1; use 0"),
        ({"bigram_rows": 9, "bigram_width": 33}, r"--model\.bigram-width is 33; use 1 to --model\.dim, 32"),
    ],
    ids=str,
)
def test_tables_that_cannot_be_are_refused(change, line):
    with pytest.raises(UserError, match=line):
        check_model(dataclasses.replace(preset("demo").model, dim=32, num_heads=2, **change))


def test_the_preset_stays_within_the_limit_and_its_table_has_the_rule_of_the_tokens():
    config = preset("bigrams")
    params = abstract_params(make_model(config.model, "bfloat16"))
    assert 160_000_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) <= 162_000_000
    assert config.optimizer.embeddings == config.optimizer.head
    assert parameter_group((jax.tree_util.DictKey("bigram_table"),)) == "embeddings"
