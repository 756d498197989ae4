"""Matrices that write into the residual stream and are not zero at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from senano_jax.config import changed
from senano_jax.errors import UserError
from senano_jax.model.config import check_model
from senano_jax.presets import preset


def fresh(output_init: float):
    model, tokens = tiny_model(dim=64, output_init=output_init), jnp.zeros((1, 128), jnp.int32)
    return jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]


def test_they_have_the_deviation_asked_for_and_all_others_are_as_without():
    """Uniform numbers in attention and normal ones in the MLP, others in each layer; 0 leaves zeros."""
    params, zeros = fresh(0.5), fresh(0.0)
    seen = []
    for path, matrix in jax.tree.leaves_with_path(params):
        plain, name = dict(jax.tree.leaves_with_path(zeros))[path], path[-1].key
        if name not in ("out", "down"):
            np.testing.assert_array_equal(matrix, plain, jax.tree_util.keystr(path))
            continue
        np.testing.assert_array_equal(plain, 0)
        deviation = 0.5 / matrix.shape[0] ** 0.5
        assert matrix.shape[0] == {"out": 64, "down": 256}[name] and matrix.dtype == jnp.float32
        assert abs(matrix.mean()) < 5 * deviation / matrix.size**0.5
        assert matrix.std() == pytest.approx(deviation, rel=0.05)
        largest = float(jnp.abs(matrix).max() / deviation)
        assert 1.7 < largest <= 3**0.5 + 1e-6 if name == "out" else 3 < largest < 6
        seen.append(float(matrix[0, 0]))
    assert len(seen) == len(set(seen)) == 8


@pytest.mark.parametrize("deviation", [-0.5, float("nan"), float("inf")])
def test_a_deviation_that_is_none_is_refused(deviation):
    with pytest.raises(UserError, match=f"--model.output-init is {deviation}; use 0 or more"):
        check_model(changed(preset("output-init").model, {"output_init": deviation}))
