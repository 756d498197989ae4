"""The validation loss: a plain mean, however the sequences are dealt out."""

import jax
import numpy as np
import pytest
from tiny import random_params, random_sequences, tiny_gpt2

from senano_jax.training import evaluation
from senano_jax.training.evaluation import Evaluator
from senano_jax.training.mesh import make_mesh


@pytest.mark.parametrize(
    ("devices", "tokens_at_a_time", "at_a_time"), [(1, 512, 3), (2, 512, 3), (4, 512, 1), (2, 64, 1)]
)
def test_short_sequences_are_evaluated_in_groups(monkeypatch, devices, tokens_at_a_time, at_a_time):
    """Six sequences of 128 tokens, at most as many together as leave work for every device; a last round that is not
    full counts nothing twice."""
    monkeypatch.setattr(evaluation, "TOKENS_AT_A_TIME", tokens_at_a_time)
    model, sequences = tiny_gpt2(num_layers=1), random_sequences(6, 128, vocabulary=500)
    params, shapes = random_params(model), []
    evaluate = Evaluator(model, make_mesh(devices), sequences)
    step = evaluate._step
    evaluate._step = lambda params, rows, *rest: (shapes.append(rows.shape), step(params, rows, *rest))[1]
    loss = evaluate(params, 1)
    assert set(shapes) == {(devices * at_a_time, 129)}
    assert evaluate.tokens == 6 * 128 and evaluate.rounds == len(shapes)
    summed = jax.jit(lambda: model.apply({"params": params}, sequences[:, :-1], sequences[:, 1:], 1))()
    assert loss == pytest.approx(float(summed) / (6 * 128), rel=1e-6)
    assert np.isfinite(loss)
