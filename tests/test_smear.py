"""Embeddings that take some of the one before: the original's numbers, and how far it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces_reference import largest_error, reference

from senano_jax.config import changed
from senano_jax.errors import UserError
from senano_jax.model.config import check_model
from senano_jax.model.elementwise import norm
from senano_jax.model.pieces.smear import Smear
from senano_jax.presets import preset


def test_it_is_the_original_function():
    """Rows before the norm, and gradients through it of everything that goes in."""
    inputs, arrays = reference("b_gates")

    def smeared(rows, gate, weight):
        return Smear().apply({"params": {"gate": gate.T, "weight": weight[0]}}, rows[None])[0]

    given = [jnp.asarray(inputs[name]) for name in ("emb", "w_smear", "lam")]
    assert largest_error(smeared(*given), arrays["smear"]) < 3e-6
    _, pull_back = jax.vjp(lambda *given: norm(smeared(*given)), *given)
    for name, gradient in zip(("emb", "w_smear", "lam"), pull_back(jnp.asarray(inputs["cc"])), strict=True):
        assert largest_error(gradient, arrays[f"d_{name}_smear"]) < 1e-5, name


def test_a_row_reads_itself_and_the_one_before():
    """Wherever documents start: it knows of none."""
    rows = jax.random.normal(jax.random.key(0), (1, 6, 16))
    params = {"gate": jnp.ones((12, 1)), "weight": jnp.float32(0.7)}
    slopes = jax.jacobian(lambda rows: Smear().apply({"params": params}, rows))(rows)
    depends = np.abs(np.asarray(slopes)[0, :, :, 0]).max((1, 3)) > 0
    np.testing.assert_array_equal(depends, np.eye(6, dtype=bool) | np.eye(6, k=-1, dtype=bool))


def test_it_changes_nothing_at_the_start_and_keeps_the_type():
    rows = jax.random.normal(jax.random.key(0), (2, 8, 16)).astype(jnp.bfloat16)
    smeared, variables = Smear().init_with_output(jax.random.key(1), rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables["params"]) == {
        "gate": ((12, 1), jnp.float32),
        "weight": ((), jnp.float32),
    }
    assert smeared.dtype == jnp.bfloat16
    np.testing.assert_array_equal(smeared, rows)


def test_a_narrow_model_is_refused():
    with pytest.raises(UserError, match=r"--model\.smear reads 12 channels, --model.dim is 8; widen it"):
        check_model(changed(preset("smear").model, {"dim": 8, "num_heads": 2}))
