"""The iterations after Muon's own: Polar Express and the flatter six steps, against their definition and the original
programs' numbers, in float32 and in bfloat16."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import odd_polynomials, relative_error

from senano_jax.config import settings
from senano_jax.optim.newton_schulz import ITERATIONS, orthogonalize
from senano_jax.presets import preset

NAMES = {"polar-express": "pe", "six-step": "anvil6"}
# constants as published, written a second time: a digit changed in one place is an error
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "data/polar.npz") as file:
        return json.loads(str(file["meta"])), {name: file[name] for name in file.files if name != "meta"}


def given(meta, case):
    """The input matrices of a case."""
    drawn = meta["inputs"][case]
    matrices = np.random.RandomState(drawn["seed"]).standard_normal(drawn["shape"]).astype(np.float32)
    if case == "illcond":
        return matrices * np.float32(10.0 ** (-3 * np.arange(64) / 63))[:, None]
    return matrices * np.float32(drawn["scale"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["sq", "batch", "batchtall", "small", "illcond"])
def test_it_is_the_original_program_in_float32(reference, name, case):
    """Outputs, or their first 32 rows and columns, and all singular values; a stack, tall matrices, a tiny scale and an
    ill-conditioned matrix among the cases."""
    meta, arrays = reference
    matrices, key = given(meta, case), f"{NAMES[name]}_f32__{case}"
    result = np.asarray(orthogonalize(matrices, ITERATIONS[name], jnp.float32))
    np.testing.assert_allclose(np.linalg.svd(result, compute_uv=False), arrays[key + "__sv"], atol=5e-5)
    tolerance = {"polar-express": 5e-5, "six-step": 1e-5}[name]
    if key in arrays:
        assert relative_error(result, arrays[key]) < tolerance
    elif key + "__block" in arrays:
        assert relative_error(result[:32, :32], arrays[key + "__block"]) < tolerance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["sq", "wide", "tall", "batch", "batchtall", "small", "illcond"])
def test_singular_values_in_bfloat16_are_those_of_the_original_program(reference, name, case):
    """But for the least one of the square matrix, of 1e-5 of the norm, which is nothing but the input's rounding."""
    meta, arrays = reference
    result = np.asarray(orthogonalize(given(meta, case), ITERATIONS[name]), np.float64)
    singular, expected = np.linalg.svd(result, compute_uv=False), arrays[f"{NAMES[name]}_bf16__{case}__sv"]
    compared = slice(-1 if case == "sq" else None)
    np.testing.assert_allclose(singular[compared], expected[compared], atol=5e-2)


def test_the_first_iteration_is_polar_express_to_the_last_digit():
    """And its divisor leaves a margin of 2%."""
    assert ITERATIONS["polar-express"][:3] == (POLAR_EXPRESS, 1.02, 1e-6)


@pytest.mark.parametrize("name", ITERATIONS)
@pytest.mark.parametrize("shape", [(48, 48), (48, 160), (160, 48)])
def test_it_is_a_function_of_the_singular_values(name, shape):
    """The same polynomials applied to the singular values of a decomposition in float64."""
    matrix = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    result = orthogonalize(matrix, ITERATIONS[name], jnp.float32)
    assert result.dtype == jnp.float32
    assert relative_error(result, odd_polynomials(matrix, *ITERATIONS[name][:3])) < 2e-5


@pytest.mark.parametrize(
    ("name", "spread", "least", "low", "high"),
    [("polar-express", 350, 1e-3, 0.858, 1.142), ("six-step", 100, 3e-3, 0.997, 1.01)],
)
def test_how_near_to_one_singular_values_end(name, spread, least, low, high):
    """The least, after the division by the norm, is just above what the iteration was made for."""
    rng = np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    singular = np.geomspace(1, spread, 64)
    assert least < 1 / (1.02 * np.linalg.norm(singular)) < 1.3 * least
    matrix = (u * singular @ v).astype(np.float32)
    result = np.asarray(orthogonalize(matrix, ITERATIONS[name], jnp.float32), np.float64)
    ends = np.diag(u.T @ result @ v.T)
    assert low < ends.min() and ends.max() < high


def test_the_preset_differs_from_the_record_in_its_iteration_alone():
    """Any other change would be measured with it."""
    plain, new = settings(preset("recurrent")), settings(preset("polar-express"))
    assert {name: new[name] for name in new if new[name] != plain[name]} == {
        "optimizer.matrices.iteration": "polar-express"
    }


@pytest.mark.parametrize("name", ITERATIONS)
def test_each_matrix_of_a_stack_by_itself_whatever_its_scale(name):
    """From 1e-3 to 1e12 times as large, beside zeros, which stay."""
    matrix = np.random.default_rng(5).standard_normal((32, 64)).astype(np.float32)
    scales = np.array([0, 1e-3, 1, 1e12], np.float32)
    zero, *results = np.asarray(orthogonalize(scales[:, None, None] * matrix, ITERATIONS[name]), np.float64)
    assert not zero.any()
    for result in results:
        assert relative_error(result, odd_polynomials(matrix, *ITERATIONS[name][:3])) < 0.03
