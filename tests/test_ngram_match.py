"""What followed the last occurrence of an n-gram: positions by brute force, values and gradients in float64, and what a
token can reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle_variants import with_continuations
from oracles import END_OF_TEXT, relative_error
from tiny import random_params, tiny_model

from senano_jax.attention import document_start
from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.config import check_model
from senano_jax.model.gpt import Gpt
from senano_jax.model.pieces.ngram_match import NgramMatch, continued, last_matches
from senano_jax.presets import preset
from senano_jax.training.mesh import make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState
from senano_jax.training.step import make_train_step

WIDTH = 8


def documents(sequences: int, length: int, vocabulary: int = 3, seed: int = 0) -> np.ndarray:
    """int32: tokens that repeat often; documents of any length, among them some of one token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (sequences, length)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.08] = END_OF_TEXT
    tokens[0, 7:9] = END_OF_TEXT
    return tokens


def expected_matches(tokens_T, order):
    """Continuations and readers of one sequence, by trying all earlier positions from the last one on."""
    length = len(tokens_T)
    continuation, reader = np.full(length, length), np.full(length, length)
    document = np.cumsum(tokens_T == END_OF_TEXT)
    for t in range(length):
        for i in range(t - 1, order - 2, -1):
            both = [(tokens_T[i - n], tokens_T[t - n]) for n in range(order)]
            if document[i - order + 1] == document[t] and all(a == b for a, b in both):
                assert reader[i + 1] == length
                continuation[t], reader[i + 1] = i + 1, t
                break
    return continuation, reader


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 61, 128])
def test_positions_are_those_found_by_trying_all(order, length):
    tokens = np.concatenate([documents(3, max(length, 9))[:, :length], np.zeros((1, length), np.int32)])
    found = jax.jit(last_matches, static_argnums=2)(tokens, document_start(tokens), order)
    expected = [expected_matches(row, order) for row in tokens]
    np.testing.assert_array_equal(found.continuation, [continuation for continuation, _ in expected])
    np.testing.assert_array_equal(found.reader, [reader for _, reader in expected])
    # All zeros, one document: of a token that repeats itself the continuation is the token itself.
    np.testing.assert_array_equal(found.continuation[-1][order:], np.arange(length)[order:])


def test_the_cases_that_positions_are_tried_on_are_all_there():
    tokens = documents(3, 128)
    starts = np.asarray(document_start(tokens))
    matches = last_matches(tokens, starts, 2)
    found = np.asarray(matches.continuation) < 128
    assert 0.3 < found.mean() < 0.9
    assert len(set(starts[0])) > 5 and (np.diff(np.flatnonzero(tokens[0] == END_OF_TEXT)) == 1).any()
    assert (np.asarray(matches.continuation) == np.arange(128)).any()


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_values_and_gradients_agree_with_loops_in_float64():
    tokens, orders = documents(2, 61), (1, 3)
    rows, pulled = drawn((2, 61, WIDTH)), drawn((2, 61, WIDTH), 1)
    params = {f"ngram_{order}": drawn((WIDTH, WIDTH), order) for order in orders}

    def piece(rows, params):
        return NgramMatch(orders).apply({"params": params}, rows, tokens, document_start(tokens))

    out, pull_back = jax.vjp(piece, *jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (rows, params)))
    d_rows, d_params = pull_back(jnp.asarray(pulled, jnp.float32))
    expected, expected_rows = [], pulled.copy()
    expected_params = {name: np.zeros((WIDTH, WIDTH)) for name in params}
    for b in range(2):
        expected.append(with_continuations(rows[b], tokens[b], params))
        for order in orders:
            continuation, _ = expected_matches(tokens[b], order)
            for t in np.flatnonzero(continuation < 61):
                expected_rows[b, continuation[t]] += pulled[b, t] @ params[f"ngram_{order}"].T
                expected_params[f"ngram_{order}"] += np.outer(rows[b, continuation[t]], pulled[b, t])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(d_rows, expected_rows, atol=1e-5)
    for name, gradient in d_params.items():
        np.testing.assert_allclose(gradient, expected_params[name], atol=1e-4)


def test_the_gradient_is_that_of_a_plain_reading_without_its_sum():
    """To the bit, as no two positions read one row; and no scatter is in the program."""
    tokens = documents(2, 61)
    matches = last_matches(tokens, document_start(tokens), 1)
    rows, pulled = (jnp.asarray(drawn((2, 61, WIDTH), seed), jnp.float32) for seed in (0, 1))

    def plain(rows):
        with_zero = jnp.concatenate([rows, jnp.zeros((2, 1, WIDTH))], axis=1)
        return jnp.take_along_axis(with_zero, matches.continuation[..., None], axis=1)

    out, pull_back = jax.vjp(lambda rows: continued(rows, matches), rows)
    expected, plain_pull_back = jax.vjp(plain, rows)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pull_back(pulled)[0], plain_pull_back(pulled)[0])
    programs = [str(jax.make_jaxpr(pull)(pulled)) for pull in (pull_back, plain_pull_back)]
    assert ["scatter" in program for program in programs] == [False, True]


MODEL = tiny_model(vocab_size=50257, num_heads=4, ngram_orders=(1, 2, 3), values_from_x0=(1,))


@functools.cache
def features(tokens_T: tuple[int, ...]) -> np.ndarray:
    run = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens, 6, method=Gpt.features))
    return np.asarray(run(random_params(MODEL), jnp.asarray(tokens_T, jnp.int32)[None]))[0]


@pytest.mark.parametrize("position", [1, 60, 128, 255])
def test_no_token_reaches_the_ones_before_it_nor_another_document(position):
    """A token is replaced by one that makes other matches: whatever is before, and behind the end of its document, is
    the same to the bit; it itself is not."""
    tokens = documents(1, 256, vocabulary=4)[0]
    assert tokens[position] != END_OF_TEXT
    replaced = tokens.copy()
    replaced[position] = (tokens[position] + 1) % 4
    differs = (features(tuple(tokens)) != features(tuple(replaced))).any(-1)
    document = np.cumsum(tokens == END_OF_TEXT)
    reached = (np.arange(256) >= position) & (document == document[position])
    np.testing.assert_array_equal(differs, reached)


def test_a_row_is_read_at_the_one_position_that_matches():
    """Exact derivatives of the piece: each position depends on its own row and on that of its continuation."""
    tokens = documents(1, 40)
    matrix = {"params": {"ngram_2": jnp.ones((2, 2))}}
    slopes = jax.jacrev(lambda rows: NgramMatch((2,)).apply(matrix, rows, tokens, document_start(tokens)))(
        jnp.ones((1, 40, 2))
    )
    depends = np.abs(np.asarray(slopes)[0, :, :, 0]).max((1, 3)) > 0
    continuation, _ = expected_matches(tokens[0], 2)
    np.testing.assert_array_equal(depends, np.eye(40, dtype=bool) | (np.arange(40) == continuation[:, None]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_it_changes_nothing_and_draws_after_all_others(dtype):
    """So that runs with and without it start from the same weights and, operation by operation, the same loss."""
    tokens, params, losses = documents(1, 128) % 500, {}, {}
    plain = tiny_model(dtype, values_from_x0=(1,), layers=LayerSchedule(1, 0, 0, 1))
    for orders in ((), (1, 3)):
        model = plain.clone(config=changed(plain.config, {"ngram_orders": orders}))
        fresh = jax.jit(model.init)(jax.random.key(3), tokens, tokens, 1)["params"]
        params[orders] = {name: value for name, value in fresh.items() if not name.startswith("ngram")}
        losses[orders] = model.apply({"params": fresh | random_params(plain)}, tokens, tokens, 1)
    assert fresh.keys() - params[()].keys() == {"ngram_1", "ngram_3"}
    assert fresh["ngram_3"].shape == (32, 32) and not fresh["ngram_1"].any() and not fresh["ngram_3"].any()
    jax.tree.map(np.testing.assert_array_equal, params[()], params[1, 3])
    assert losses[()] == losses[1, 3]


def test_sequences_on_two_devices_give_the_step_of_one():
    """Each device finds the matches of its own sequences: none crosses from one to another."""
    model = tiny_model(layers=LayerSchedule(1, 0, 0, 1), ngram_orders=(1, 2))
    before, sequences = random_params(model), documents(4, 129) % 500
    moves = []
    for devices in (1, 2):
        mesh, optimizer = make_mesh(devices), optax.sgd(1e-3)
        state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(np.array, before), optimizer.init(before))
        batch = place_batch(mesh, sequences, 1)
        state, metrics = make_train_step(model, optimizer, mesh)(jax.device_put(state, replicated(mesh)), batch, 1)
        moves.append((jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, before), metrics.loss))
    (one, loss), (two, other_loss) = moves
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    for name in ("ngram_1", "ngram_2", "embedding"):
        assert np.any(one[name]) and relative_error(two[name], one[name]) < 1e-4, name


def test_the_preset_keeps_the_strict_limit_of_parameters():
    config = preset("ngrams")
    params = abstract_params(make_model(config.model, config.dtype))
    assert count_parameters(params) == 158_960_046 + 3 * 768**2 <= 162_000_000


@pytest.mark.parametrize(
    ("orders", "said"), [((0, 1), "0 1"), ((1, 1), "1 1"), ((2, 1), "2 1"), ((9,), "9"), ((-1,), "-1")], ids=str
)
def test_orders_that_cannot_be_are_refused(orders, said):
    message = f"--model.ngram-orders is {said}; use numbers from 1 to 8, ascending and each once, or none"
    with pytest.raises(UserError, match=f"^{message}$"):
        check_model(changed(preset("demo").model, {"ngram_orders": orders}))
