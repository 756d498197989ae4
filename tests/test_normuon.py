"""NorMuon with its matrices and rates, against float64 NumPy and against numbers of the original program.

Both have matrices as [out, in], and the second projection of an MLP transposed: [hidden, out], as ours are.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracles import odd_polynomials, relative_error

from senano_jax.config import changed, settings
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.cuts import cut, joined
from senano_jax.optim.muon import orthogonalized, scale_by_muon, step_factor
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.normuon import normalized
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset

B2, RATE, STEPS = 0.9, 0.023, 5
POLAR_EXPRESS = ITERATIONS["polar-express"]
FLOAT32 = normalized(orthogonalized(POLAR_EXPRESS, jnp.float32), B2)
SHAPES = {"qkv": (3, 48, 48), "out": (48, 48), "up": (48, 192), "down": (192, 48)}


def momentum(step):
    return 0.85 + step / 3000


def as_published(average, square, gradient, mu):
    """One step of one matrix in the published orientation, float64: average, mean squares and O."""
    average = average + (1 - mu) * (gradient - average)
    step = odd_polynomials((1 - mu) * gradient + mu * average, *POLAR_EXPRESS[:3])
    rows, columns = step.shape
    axis, size = (1, columns) if rows >= columns else (0, rows)
    v = np.mean(step**2, axis=axis, keepdims=True)
    square = square + (1 - B2) * (v - square)
    c = np.maximum(square, 1e-10) ** -0.5
    n0, n1 = np.linalg.norm(step), np.sqrt(np.sum(v * size * c**2))
    return average, square, step * c * n0 / max(n1, 1e-10)


def published_matrices(tree):
    """Name -> (factor of the rate, matrix) of a tree of one layer in our layout: q and k by two heads, and so on."""
    q, k, v = tree["qkv"]
    pairs = {f"{name}{i}": (1, m[:, 16 * i : 16 * i + 16].T) for name, m in (("q", q), ("k", k)) for i in range(3)}
    return pairs | {"v": (1, v.T), "out": (1, tree["out"].T), "up": (2, tree["up"].T), "down": (4, tree["down"])}


def random_gradients(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def steps_of(rule, gradients, axis_name=None, wrap=lambda update: update, **options):
    """Yields updates and state of each step."""
    optimizer = scale_by_muon(momentum, rule, axis_name, **options)
    state, update = optimizer.init(gradients[0]), jax.jit(wrap(optimizer.update))
    for gradient in gradients:
        updates, state = update(gradient, state)
        yield updates, state


def test_it_is_the_formula():
    """Every matrix of a layer over three steps: per hidden unit in both projections, per output of out and the values,
    per input of two heads' queries and keys; and the factors of the rates."""
    average, square = {}, {}
    gradients = [random_gradients(seed) for seed in range(3)]
    for step, (updates, _) in enumerate(steps_of(FLOAT32, gradients, query_key_columns=16, down_rate=4.0)):
        ours = published_matrices(jax.tree.map(np.asarray, updates))
        for name, (factor, gradient) in published_matrices(gradients[step]).items():
            average[name], square[name], expected = as_published(
                average.get(name, 0.0), square.get(name, 0.0), gradient.astype(np.float64), momentum(step)
            )
            assert relative_error(ours[name][1], factor * expected) < 1e-5, name


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "data/normuon.npz") as file:
        return json.loads(str(file["meta"])), {name: file[name] for name in file.files if name != "meta"}


def our_layout(case, stored):
    """A case's matrices (n, out, in) as our parameters; the values beside queries and keys are zero."""
    if case == "qk":
        q, k = (np.concatenate([m.T for m in part], axis=1) for part in (stored[:3], stored[3:]))
        return {"qkv": np.stack([q, k, np.zeros_like(q)])}
    if case == "mlp":
        return {"up": stored[0].T, "down": stored[1]}
    return {"out": stored[0].T}


@pytest.mark.parametrize("case", ["wide", "tall", "square", "qk", "mlp"])
def test_it_is_the_original_program(reference, case):
    """Its first step and its mean squares and weights after five, float32, without decay."""
    meta, arrays = reference
    about = meta["cases"][case]
    assert (meta["lr"], meta["beta2"]) == (RATE, B2)
    assert np.allclose(meta["momentum_of_step_0_to_4"], [momentum(step) for step in range(STEPS)])

    def drawn(seed, scale):
        stored = np.random.RandomState(seed).standard_normal(about["shape"]).astype(np.float32) * np.float32(scale)
        return our_layout(case, stored)

    factors = {"up": 2, "down": 4, "out": 3**0.5 if case == "tall" else 1, "qkv": 1}
    gradients = [drawn(seed, about["grad_scale"]) for seed in about["grad_seeds"]]
    start = weights = drawn(about["weight_seed"], about["weight_scale"])
    expected = our_layout(case, arrays[f"{case}__f32__s1__upd"])
    history = list(steps_of(FLOAT32, gradients, query_key_columns=16, down_rate=4.0))
    for name, update in history[0][0].items():
        assert relative_error(update, factors[name] * expected[name]) < 1e-5
    for updates, _ in history:
        weights = {name: w - RATE * np.asarray(updates[name]) for name, w in weights.items()}
    for name, end in our_layout(case, arrays[f"{case}__f32__wd0__s5__w"]).items():
        assert relative_error(weights[name] - start[name], end - start[name]) < 2e-5
    shape = {"wide": "24x72", "tall": "24x72", "square": "32x32", "qk": "16x48", "mlp": "16x64"}[case]
    _, squares = history[-1][1].stacks[shape]
    expected = arrays[f"{case}__f32__s5__q"].reshape(squares.shape)
    assert relative_error(squares, expected[::-1] if case == "mlp" else expected) < 1e-5  # down, then up


def test_in_bfloat16_it_is_the_same_up_to_rounding():
    """As training runs it; and the step is of unit rate: float32, with the norm that the orthogonal one has."""
    gradients = [random_gradients(seed) for seed in range(3)]
    rule = orthogonalized(POLAR_EXPRESS)
    for (rough, _), (fine, _), (plain, _) in zip(
        steps_of(normalized(rule, B2), gradients), steps_of(FLOAT32, gradients), steps_of(rule, gradients)
    ):
        for name in SHAPES:
            assert rough[name].dtype == jnp.float32
            assert relative_error(rough[name], fine[name]) < 0.06
            norm, expected = (np.linalg.norm(tree[name], axis=(-2, -1)) for tree in (rough, plain))
            np.testing.assert_allclose(norm, expected, rtol=5e-3)


def test_a_zero_gradient_gives_a_zero_step():
    """Also at the first step, where the mean squares are zero too."""
    zeros = jax.tree.map(np.zeros_like, random_gradients(0))
    for updates, _ in steps_of(normalized(orthogonalized(POLAR_EXPRESS), B2), [zeros, zeros], query_key_columns=16):
        for update in updates.values():
            np.testing.assert_array_equal(update, 0)


def test_sharing_the_work_over_devices_changes_nothing():
    """Eight devices return what one returns, statistics included: of 8 layers' stacks all divide, of 3 layers' not."""
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))

    def shared(update):
        return jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

    for layers in (3, 8):
        shapes = {f"layer_{n}_{name}": shape for n in range(layers) for name, shape in SHAPES.items()}
        gradients = [random_gradients(seed, shapes) for seed in range(2)]
        rule = normalized(orthogonalized(POLAR_EXPRESS, jnp.float32), B2)
        for one, eight in zip(steps_of(rule, gradients), steps_of(rule, gradients, "data", shared)):
            for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one)):
                assert relative_error(x, y) < 1e-5


def test_queries_and_keys_are_cut_by_heads_and_joined_again():
    """Columns 32 to 63 of the keys are their second part; the values stay whole."""
    path = (jax.tree_util.DictKey("attention"), jax.tree_util.DictKey("qkv"))
    qkv = jnp.arange(3 * 8 * 96.0).reshape(3, 8, 96)
    parts, values = cut(path, qkv, 32)
    assert parts.shape == (2, 3, 8, 32)
    np.testing.assert_array_equal(parts[1, 1], qkv[1, :, 32:64])
    np.testing.assert_array_equal(values, qkv[2])
    np.testing.assert_array_equal(joined([parts, values]), qkv)
    assert cut(path[:1], qkv, 32)[0] is cut(path, qkv, None)[0] is qkv


def test_columns_that_do_not_divide_are_refused():
    """With the configuration, or when the state of a model that is not the configuration's is made; the flag, its value
    and what there is to divide."""
    config = changed(preset("normuon"), {"optimizer.matrices.query_key_columns": 40})
    with pytest.raises(UserError, match=r"--optimizer.matrices.query-key-columns is 40; it must divide the 768 column"):
        check_config(config)
    check_config(changed(config, {"own_model": "Own 0123"}))
    params = {"layer_0": {"attention": {"qkv": jnp.zeros((3, 96, 96))}}}
    with pytest.raises(UserError, match=r"--optimizer.matrices.query-key-columns is 40; it must divide the 96 columns"):
        jax.eval_shape(make_optimizer(config.optimizer, 5).init, params)
    with pytest.raises(UserError, match=r"--optimizer.matrices.query-key-columns is 0; it must be at least 1"):
        check_config(changed(config, {"optimizer.matrices.query_key_columns": 0}))
    with pytest.raises(UserError, match=r"--optimizer.matrices.neuron-b2 is 1.5; use a number from 0, and below 1"):
        check_config(changed(config, {"optimizer.matrices.neuron_b2": 1.5}))
    gpt2 = {"layer_0": {"attention": {"qkv": {"kernel": jnp.zeros((96, 288))}}}}
    with pytest.raises(UserError, match=r"--optimizer.matrices.query-key-columns is for models that keep queries"):
        jax.eval_shape(make_optimizer(config.optimizer, 5).init, gpt2)


def test_the_second_projection_goes_farther_in_gpt2_too():
    """Whose dense layers keep their matrices as kernels."""
    of_ours, of_gpt2, other = (tuple(map(jax.tree_util.DictKey, names)) for names in (
        ("mlp", "down"), ("mlp", "down", "kernel"), ("mlp", "up", "kernel"),
    ))  # fmt: skip
    assert step_factor(of_ours, (96, 24), 4.0) == step_factor(of_gpt2, (96, 24), 4.0) == 4.0
    assert step_factor(other, (96, 24), 4.0) == 1.0


def test_the_preset_differs_from_polar_express_in_its_matrices_alone():
    """Two heads of 128 columns together."""
    plain, new = preset("polar-express"), preset("normuon")
    different = {name for name, value in settings(new).items() if value != settings(plain)[name]}
    assert different == {
        f"optimizer.matrices.{name}" for name in ("rate", "neuron_b2", "query_key_columns", "down_rate")
    }
    assert new.optimizer.matrices.query_key_columns == 2 * new.model.head_dim
