"""Adam with float32 arithmetic, against the formula in float64 and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

from senano_jax.config import changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.adam import scale_by_float32_adam
from senano_jax.presets import preset

B1, B2, EPS = 0.8, 0.95, 1e-10


def run(params, gradients, learning_rate):
    """The parameters after each step."""
    optimizer = optax.chain(scale_by_float32_adam(B1, B2, EPS), optax.scale_by_learning_rate(learning_rate))
    state, trajectory = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state[0]


def random_problem(dtype, steps=12):
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.uniform(-6, 4, (30, 20))  # sums over tokens: rare tokens get tiny gradients
    params = jnp.asarray(rng.standard_normal((30, 20)), dtype)
    return params, [jnp.asarray(scales * rng.standard_normal((30, 20)), dtype) for _ in range(steps)]


def test_it_is_the_formula():
    """Bias-corrected moments, epsilon outside the root."""
    params, gradients = random_problem(jnp.float32)
    trajectory, state = run(params, gradients, 0.1)
    x, m, v = np.asarray(params, np.float64), 0.0, 0.0
    for t, (gradient, ours) in enumerate(zip(gradients, trajectory), start=1):
        g = np.asarray(gradient, np.float64)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        x = x - 0.1 * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
        np.testing.assert_allclose(ours, x, rtol=1e-5, atol=2e-6)
    assert relative_error(state.mean, m) < 1e-6
    assert relative_error(state.square, v) < 1e-6
    assert state.count == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_pytorch(dtype):
    """Its fused Adam, which keeps moments in the parameters' type and computes in float32 as we do."""
    torch = pytest.importorskip("torch")
    params, gradients = random_problem(dtype)
    trajectory, _ = run(params, gradients, 0.3)

    def tensor(array):
        return torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, dtype))

    parameter = torch.nn.Parameter(tensor(params))
    optimizer = torch.optim.Adam([parameter], lr=0.3, betas=(B1, B2), eps=EPS, fused=True)
    for gradient, ours in zip(gradients, trajectory):
        parameter.grad = tensor(gradient)
        optimizer.step()
        assert ours.dtype == dtype
        theirs = parameter.detach().float().numpy()
        # a bfloat16 weight may round to its other neighbour where the float32 values differ in their last bits
        tolerance = {"float32": 1e-5, "bfloat16": 2.0**-7}[dtype]
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=tolerance, atol=tolerance)
    assert np.mean(np.abs(np.asarray(ours, np.float32) - theirs) > 1e-5) < 0.01


def test_moments_have_the_types_of_the_parameters():
    """A bfloat16 table costs 2 + 2 bytes of state an entry; what is applied is a float32 step."""
    params = {"embedding": jnp.ones((4, 3), jnp.bfloat16), "scalar": jnp.ones(())}
    optimizer = scale_by_float32_adam(B1, B2, EPS)
    updates, state = optimizer.update(params, optimizer.init(params))
    for moments in (state.mean, state.square):
        assert jax.tree.map(lambda x: x.dtype, moments) == jax.tree.map(lambda x: x.dtype, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def test_bfloat16_arithmetic_is_float32():
    """Moments are rounded between steps and nothing else is: float64 from the stored moments gives the same step."""
    params, gradients = random_problem(jnp.bfloat16, steps=4)
    optimizer = scale_by_float32_adam(B1, B2, EPS)
    state = optimizer.init(params)
    for t, gradient in enumerate(gradients, start=1):
        g, m, v = (np.asarray(x, np.float64) for x in (gradient, state.mean, state.square))
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        updates, state = optimizer.update(gradient, state)
        np.testing.assert_allclose(updates, (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(state.mean, np.float64), m, rtol=2.0**-8, atol=1e-9)
        np.testing.assert_allclose(np.asarray(state.square, np.float64), v, rtol=2.0**-8)


def test_a_zero_gradient_gives_a_zero_step():
    """An embedding row no token of the step uses stays where it is; it moves once it has been used."""
    optimizer = scale_by_float32_adam(B1, B2, EPS)
    params = jnp.ones((2, 3))
    state = optimizer.init(params)
    for gradient in (jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[0].set(1e-3)):
        updates, state = optimizer.update(gradient, state)
        np.testing.assert_array_equal(updates[1], 0)
    assert (updates[0] > 0.1).all()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("b1", 1.0, "from 0, and below 1"), ("b2", 1.0, "from 0, and below 1"), ("eps", 0.0, "above 0")],
)
def test_what_would_divide_zero_by_zero_is_refused(field, value, allowed):
    """In the first step, or for the rows of an embedding that no token has read yet."""
    config = changed(preset("recurrent"), {f"optimizer.embeddings.{field}": value})
    with pytest.raises(UserError, match=rf"--optimizer.embeddings.{field} is {value}; use a number {allowed}"):
        check_config(config)
