"""Directions whitened by the gradients before they are orthogonalised, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from muon_steps import random_gradients, steps_of
from oracles import relative_error

from senano_jax.config import changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.config import Whitening
from senano_jax.optim.muon import orthogonalized
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.normuon import normalized
from senano_jax.optim.recipe import make_optimizer
from senano_jax.optim.stacks import StackRule
from senano_jax.optim.whitening import WhiteningState, inverse_root, whitened
from senano_jax.presets import preset

AS_IT_IS = StackRule(lambda stack: (), lambda stack, kept, *_: (stack, kept))
MUON = normalized(orthogonalized(ITERATIONS["polar-express"], jnp.float32), 0.9)


def root_of(moment) -> np.ndarray:
    """(C + ridge)^(-1/2) of one matrix by its eigenvalues, in the scale that ours has."""
    rows = len(moment)
    c = moment / (np.trace(moment) / rows) + 1e-3 * np.eye(rows)
    values, vectors = np.linalg.eigh(c / np.linalg.norm(c))
    return (vectors * values**-0.5) @ vectors.T


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        (np.ones(48), 0.01),
        (np.logspace(0, -3, 48), 0.01),
        (np.logspace(6, -4, 96), 0.01),
        (np.r_[np.ones(3), np.zeros(93)], 0.01),
        (np.r_[np.ones(1), np.zeros(255)], 0.06),  # the ridge is 4e-6 of the norm
    ],
    ids=["equal", "of 3 decades", "of 10 decades", "of rank 3", "of rank 1"],
)
def test_the_root_is_the_inverse_one(values, tolerance):
    """In every direction, whatever the scale of the matrix."""
    vectors, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))
    moment = (vectors * values) @ vectors.T
    expected = np.linalg.inv(root_of(moment))
    for scale in (1e-12, 1.0, 1e9):
        root = np.asarray(inverse_root(jnp.asarray(scale * moment, jnp.float32)[None]), np.float64)[0]
        assert np.linalg.norm(root @ expected - np.eye(len(values)), 2) < tolerance


def test_the_root_is_computed_in_float32_proper():
    """On a GPU products of float32 are otherwise of TF32."""
    program = jax.jit(inverse_root).lower(jnp.zeros((1, 16, 16))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_it_is_the_formula():
    """Three steps of two wide matrices, by the second moment of their gradients; the root of the first step serves the
    second, too."""
    rng = np.random.default_rng(1)
    stacks = rng.standard_normal((3, 2, 24, 40))
    gradients = rng.standard_normal((3, 2, 24, 1)) ** 2 * rng.standard_normal((3, 2, 24, 40))
    rule = whitened(AS_IT_IS, Whitening(decay=0.8, every=2))
    kept = rule.init(jnp.asarray(stacks[0], jnp.float32))
    update, moment = jax.jit(rule.update), np.zeros((2, 24, 24))
    for step, (stack, gradient) in enumerate(zip(stacks, gradients)):
        white, kept = update(jnp.asarray(stack, jnp.float32), kept, jnp.asarray(gradient, jnp.float32), step)
        moment = 0.8 * moment + 0.2 * gradient @ gradient.mT
        if step != 1:
            roots = np.stack([root_of(c) for c in moment])
        assert relative_error(white, roots @ stack) < 0.01
    assert relative_error(kept[1].moment, moment) < 1e-6
    assert relative_error(stack, white) > 0.1


def test_gradients_of_one_size_leave_muon_as_it_is():
    """The second moment of an orthogonal matrix is the identity."""
    x, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((64, 48)))
    gradient = jnp.asarray(x.T[None], jnp.float32)
    stack = jnp.asarray(np.random.default_rng(3).standard_normal((1, 48, 64)), jnp.float32)
    rule = orthogonalized(ITERATIONS["six-step"], jnp.float32)
    plain, _ = rule.update(stack, (), None, 0)
    both = whitened(rule, Whitening(decay=0.9, every=1))
    white, _ = both.update(stack, both.init(stack), gradient, 0)
    assert relative_error(white, plain) < 0.02


def white_steps(gradients, *sharing):
    return steps_of(whitened(MUON, Whitening(decay=0.9, every=2)), gradients, *sharing, query_key_columns=16)


def kept_in(state) -> list[WhiteningState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, WhiteningState))
    return [leaf for leaf in leaves if isinstance(leaf, WhiteningState)]


def test_the_moment_is_of_gradients_not_of_directions():
    """Of the second of two steps; a rule around a whitened one hands the gradients on."""
    gradients = [random_gradients(seed) for seed in range(2)]
    expected = 0.0
    for gradient in gradients:
        up, down = (x.astype(np.float64) for x in (gradient["up"], gradient["down"].T))
        expected = 0.9 * expected + 0.1 * np.stack([up @ up.T, down @ down.T])
    outside = normalized(whitened(AS_IT_IS, Whitening(decay=0.9, every=2)), 0.9)
    for steps in (white_steps(gradients), steps_of(outside, gradients)):
        *_, (_, state) = steps
        (kept,) = kept_in(state.stacks["48x192"])
        assert sorted(relative_error(x, y) < 1e-6 for x in kept.moment for y in expected) == [False] * 2 + [True] * 2


def test_a_zero_gradient_gives_a_zero_step():
    """At the first step, where there is no moment yet, and at the next one."""
    zeros = jax.tree.map(np.zeros_like, random_gradients(0))
    for updates, _ in white_steps([zeros, zeros]):
        for update in jax.tree.leaves(updates):
            np.testing.assert_array_equal(update, 0)


def test_sharing_the_work_over_devices_changes_nothing():
    """Four devices return what one returns, moments and roots included: of 18 matrices the last share has three and
    zeros, of 6 only zeros."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))

    def shared(update):
        return jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

    gradients = [{f"layer_{n}": random_gradients(10 * seed + n) for n in range(3)} for seed in range(3)]
    for one, four in zip(white_steps(gradients), white_steps(gradients, "data", shared)):
        for x, y in zip(jax.tree.leaves(four), jax.tree.leaves(one)):
            assert relative_error(x, y) < 1e-4


def test_a_recipe_takes_it():
    """Its step differs from Muon's by more than rounding; its state has a moment for each stack."""
    plain = changed(preset("normuon"), {"optimizer.matrices.query_key_columns": 16})
    config = changed(plain, {"optimizer.matrices.whitening": Whitening(decay=0.9, every=2)})
    check_config(config)
    gradients = {
        "layer_0": {"attention": {"qkv": random_gradients(3)["qkv"]}, "mlp": {"up": random_gradients(3)["up"]}}
    }
    params = jax.tree.map(jnp.ones_like, gradients)
    steps = {}
    for name, recipe in {"plain": plain.optimizer, "white": config.optimizer}.items():
        optimizer = make_optimizer(recipe, 5)
        steps[name], state = optimizer.update(gradients, optimizer.init(params), params)
    assert {kept.moment.shape for kept in kept_in(state)} == {(6, 16, 16), (1, 48, 48)}
    for x, y in zip(jax.tree.leaves(steps["white"]), jax.tree.leaves(steps["plain"])):
        assert 0.02 < relative_error(x, y) < 0.9  # 1 of a step of zeros, as if no root had been computed yet


@pytest.mark.parametrize(
    ("whitening", "message"),
    [
        (Whitening(decay=1.0, every=5), "decay is 1.0; use a number from 0, and below 1"),
        (Whitening(decay=0.9, every=0), "every is 0; it must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(whitening, message):
    with pytest.raises(UserError, match=f"--optimizer.matrices.whitening.{message}"):
        check_config(changed(preset("normuon"), {"optimizer.matrices.whitening": whitening}))
