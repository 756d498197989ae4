"""A tied table's embeddings with a difference of low rank: an oracle in float64, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from senano_jax.errors import UserError
from senano_jax.model.build import make_model
from senano_jax.model.config import check_model
from senano_jax.model.pieces.input_correction import InputCorrection
from senano_jax.presets import preset

VOCAB, RANK, WIDTH = 11, 3, 8
TOKENS = np.array([[4, 0, 4, 10], [7, 7, 7, 1]])


def drawn():
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((2, 4, WIDTH)),
        rng.standard_normal((VOCAB, RANK)),
        rng.standard_normal((RANK, WIDTH)),
        rng.standard_normal((2, 4, WIDTH)),
    )


def test_values_and_gradients_agree_with_numpy_in_float64():
    rows, left, right, pulled = drawn()

    def corrected(rows, left, right):
        params = {"params": {"input_left": left, "input_right": right}}
        return InputCorrection(VOCAB, RANK).apply(params, rows, jnp.asarray(TOKENS))

    out, pull_back = jax.vjp(corrected, *(jnp.asarray(x, jnp.float32) for x in (rows, left, right)))
    np.testing.assert_allclose(out, rows + left[TOKENS] @ right, atol=1e-5)
    d_rows, d_left, d_right = pull_back(jnp.asarray(pulled, jnp.float32))
    expected = np.zeros_like(left)
    np.add.at(expected, TOKENS, pulled @ right.T)
    np.testing.assert_allclose(d_rows, pulled, atol=1e-6)
    np.testing.assert_allclose(d_left, expected, atol=1e-5)
    np.testing.assert_allclose(d_right, np.einsum("btr,btd->rd", left[TOKENS], pulled), atol=1e-5)


def test_at_the_start_it_changes_nothing_and_draws_after_all_others():
    """So that runs with and without it start from the same weights."""
    plain = dataclasses.replace(TINY, tied=True)
    inputs = jnp.arange(128)[None]
    params = {}
    losses = {}
    for rank in (0, 4):
        model = make_model(dataclasses.replace(plain, input_rank=rank), "float32")
        variables = jax.jit(model.init)(jax.random.key(3), inputs, inputs, 1)
        params[rank] = variables["params"]
        losses[rank] = model.apply(variables, inputs, inputs, 1)
    added = {name: params[4].pop(name) for name in ("input_left", "input_right")}
    jax.tree.map(np.testing.assert_array_equal, params[0], params[4])
    assert losses[0] == losses[4]
    assert added["input_left"].shape == (plain.vocab_size, 4) and not added["input_left"].any()
    assert np.std(added["input_right"]) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tied": True, "input_rank": -1}, r"--model\.input-rank is -1; use 0, for none, to 31"),
        ({"tied": True, "input_rank": 32}, r"--model\.input-rank is 32; use 0"),
        ({"input_rank": 4}, r"--model\.input-rank is 4, but the embedding is a table by itself; use --model\.tied"),
    ],
    ids=str,
)
def test_ranks_that_cannot_be_are_refused(change, line):
    with pytest.raises(UserError, match=line):
        check_model(dataclasses.replace(preset("demo").model, dim=32, num_heads=2, **change))


def test_the_preset_stays_within_the_limit_and_its_tables_learn_as_the_shared_one_does():
    config = preset("input-rank")
    rank, spare = config.model.input_rank, 162_000_000 - 158_960_046
    assert 0 < rank * (config.model.vocab_size + config.model.dim) <= spare
    assert config.optimizer.embeddings == config.optimizer.head
