"""Directions whitened before they are orthogonalised, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracles import relative_error

from senano_jax.config import changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.config import Whitening
from senano_jax.optim.momentum import nesterov
from senano_jax.optim.muon import orthogonalized, scale_by_muon
from senano_jax.optim.newton_schulz import ITERATIONS
from senano_jax.optim.normuon import normalized
from senano_jax.optim.recipe import make_optimizer
from senano_jax.optim.stacks import StackRule
from senano_jax.optim.whitening import inverse_root, whitened
from senano_jax.presets import preset

AS_IT_IS = StackRule(lambda stack: (), lambda stack, kept, _: (stack, kept))
MUON = normalized(orthogonalized(ITERATIONS["polar-express"], jnp.float32), 0.9)
SHAPES = {"qkv": (3, 48, 48), "out": (48, 48), "up": (48, 192), "down": (192, 48)}


def root_of(covariance) -> np.ndarray:
    """(C / mean + ridge)^(-1/2) of one matrix by its eigenvalues, C divided by its norm."""
    rows = len(covariance)
    c = covariance / (np.trace(covariance) / rows) + 1e-3 * np.eye(rows)
    values, vectors = np.linalg.eigh(c / np.linalg.norm(c))
    return (vectors * values**-0.5) @ vectors.T


def with_eigenvalues(values, seed=0) -> np.ndarray:
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (vectors * values) @ vectors.T


@pytest.mark.parametrize(
    "values",
    [np.ones(48), np.logspace(0, -3, 48), np.logspace(6, -4, 96), np.r_[np.ones(3), np.zeros(93)]],
    ids=["equal", "of 3 decades", "of 10 decades", "of rank 3"],
)
def test_the_root_is_the_inverse_one(values):
    """Within 1% of float64's in every direction, whatever the scale of the matrix."""
    covariance = with_eigenvalues(values)
    expected = root_of(covariance)
    for scale in (1e-12, 1.0, 1e9):
        root = np.asarray(inverse_root(jnp.asarray(scale * covariance, jnp.float32)[None]), np.float64)[0]
        assert np.linalg.norm(root @ np.linalg.inv(expected) - np.eye(len(values)), 2) < 0.01


def test_it_is_the_formula():
    """Three steps of two wide matrices, by the covariance of their gradients; the root of the first step serves the
    second, too."""
    rng = np.random.default_rng(1)
    stacks = rng.standard_normal((3, 2, 24, 40))
    gradients = rng.standard_normal((3, 2, 24, 1)) ** 2 * rng.standard_normal((3, 2, 24, 40))
    rule = whitened(AS_IT_IS, Whitening(decay=0.8, every=2))
    assert rule.reads_gradients
    kept = rule.init(jnp.asarray(stacks[0], jnp.float32))
    update, covariance = jax.jit(rule.update), np.zeros((2, 24, 24))
    for step, (stack, gradient) in enumerate(zip(stacks, gradients)):
        white, kept = update(jnp.asarray(stack, jnp.float32), kept, jnp.asarray(gradient, jnp.float32))
        covariance = 0.8 * covariance + 0.2 * gradient @ gradient.mT
        if step != 1:
            roots = np.stack([root_of(c) for c in covariance])
        assert relative_error(white, roots @ stack) < 0.01
    assert relative_error(kept[1].covariance, covariance) < 1e-6
    assert relative_error(stack, white) > 0.1


def test_gradients_that_vary_alike_leave_muon_as_it_is():
    """The covariance of an orthogonal matrix is the identity."""
    x, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((64, 48)))
    gradient = jnp.asarray(x.T[None], jnp.float32)
    stack = jnp.asarray(np.random.default_rng(3).standard_normal((1, 48, 64)), jnp.float32)
    rule = orthogonalized(ITERATIONS["six-step"], jnp.float32)
    plain, _ = rule.update(stack, (), None)
    both = whitened(rule, Whitening(decay=0.9, every=1))
    white, _ = both.update(stack, both.init(stack), gradient)
    assert relative_error(white, plain) < 0.02


def random_gradients(seed, layers=1):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{n}": {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        for n in range(layers)
    }


def steps_of(gradients, axis_name=None, wrap=lambda update: update):
    rule = whitened(MUON, Whitening(decay=0.9, every=2))
    optimizer = scale_by_muon(nesterov(lambda step: 0.9), rule, axis_name, query_key_columns=16)
    state, update = optimizer.init(gradients[0]), jax.jit(wrap(optimizer.update))
    for gradient in gradients:
        updates, state = update(gradient, state)
        yield updates, state


def test_a_zero_gradient_gives_a_zero_step():
    """At the first step, where nothing has varied yet, and at the next one."""
    zeros = jax.tree.map(np.zeros_like, random_gradients(0))
    for updates, _ in steps_of([zeros, zeros]):
        for update in jax.tree.leaves(updates):
            np.testing.assert_array_equal(update, 0)


def test_sharing_the_work_over_devices_changes_nothing():
    """Eight devices return what one returns, covariances and roots included; stacks of 3 layers do not divide."""
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))

    def shared(update):
        return jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

    gradients = [random_gradients(seed, layers=3) for seed in range(3)]
    for one, eight in zip(steps_of(gradients), steps_of(gradients, "data", shared)):
        for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one)):
            assert relative_error(x, y) < 1e-4


def test_a_recipe_takes_it():
    """Its step differs from Muon's by more than rounding; its state has a covariance for each stack."""
    plain = changed(preset("normuon"), {"optimizer.matrices.query_key_columns": 16})
    config = changed(plain, {"optimizer.matrices.whitening": Whitening(decay=0.9, every=2)})
    check_config(config)
    params = {"layer_0": {"attention": {"qkv": jnp.ones((3, 48, 48))}, "mlp": {"up": jnp.ones((48, 192))}}}
    gradients = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), x.dtype), params)
    steps = {}
    for name, recipe in {"plain": plain.optimizer, "white": config.optimizer}.items():
        optimizer = make_optimizer(recipe, 5)
        steps[name], state = optimizer.update(gradients, optimizer.init(params), params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 3 and leaf.shape[-1] == leaf.shape[-2]}
    assert {(6, 16, 16), (1, 48, 48)} <= shapes
    for x, y in zip(jax.tree.leaves(steps["white"]), jax.tree.leaves(steps["plain"])):
        assert relative_error(x, y) > 0.02


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
