"""Which rule moves which parameter, how far, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

from senano_jax.model.build import abstract_params, make_model
from senano_jax.optim.groups import make_optimizer, parameter_group
from senano_jax.optim.schedules import learning_rate_factor
from senano_jax.presets import preset

OPTIMIZER = preset("recurrent").optimizer


@pytest.mark.parametrize(
    ("name", "muon", "embed", "scalar"),
    [("recurrent", 48, 1, 25), ("no-value-embeddings", 48, 1, 25), ("value-embeddings", 46, 4, 24)],
)
def test_every_parameter_has_its_rule(name, muon, embed, scalar):
    """48 tensors of matrices for Muon (12 layers of qkv, out, up, down), one embedding, one head, 25 scalars' tensors:
    lambdas and value residual of 12 layers, and the skip weights. With value embeddings there are three more tables,
    and one layer has no attention."""
    groups = {}
    for path, leaf in jax.tree.leaves_with_path(abstract_params(make_model(preset(name).model, "bfloat16"))):
        groups.setdefault(parameter_group(path, leaf), []).append((path[-1].key, leaf.ndim))
    assert {group: len(members) for group, members in groups.items()} == {
        "muon": muon,
        "embed": embed,
        "head": 1,
        "scalar": scalar,
    }
    mixing = "value_lambdas" if name == "value-embeddings" else "value_residual"
    assert {key for key, _ in groups["muon"]} == {"qkv", "out", "up", "down"}
    assert {key for key, _ in groups["scalar"]} == {"lambdas", mixing, "skip_weights"}


def tree(fill):
    """One parameter of every kind."""
    layer = {"attention": {"qkv": fill(3, 16, 16), "value_residual": fill()}, "mlp": {"up": fill(16, 64)}}
    return {
        "embedding": fill(20, 16).astype(jnp.bfloat16),
        "head": fill(16, 24),
        "skip_weights": fill(3),
        "layer_0": layer | {"lambdas": fill(2)},
    }


def constant_gradient():
    rng = np.random.default_rng(0)
    return tree(lambda *shape: jnp.asarray(rng.standard_normal(shape) * 100, jnp.float32))


def test_rates_and_their_schedule():
    """Under a constant gradient Adam moves every entry by its rate, against the gradient's sign, and Muon by 0.05 in
    the direction the first step had: so the schedule's factor can be read off every step of a run of five."""
    gradients = constant_gradient()
    optimizer = make_optimizer(OPTIMIZER, steps=5)
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    first = None
    for step in range(5):
        updates, state = update(gradients, state, params)
        first = first or updates
        factor = float(learning_rate_factor(step, 5, OPTIMIZER))
        assert factor == pytest.approx([1, 1, 1, 1, 0.55][step])
        adam = {
            0.6: (updates["embedding"], gradients["embedding"]),
            0.22: (updates["head"], gradients["head"]),
            0.04: (updates["skip_weights"], gradients["skip_weights"]),
        }
        for rate, (moved, gradient) in adam.items():
            # moments of a bfloat16 table are rounded between steps
            tolerance = 2e-2 if gradient.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(moved, -rate * factor * np.sign(gradient.astype(jnp.float32)), rtol=tolerance)
        for name in ("lambdas", "attention", "mlp"):
            for moved, start in zip(jax.tree.leaves(updates["layer_0"][name]), jax.tree.leaves(first["layer_0"][name])):
                assert relative_error(moved, factor * start) < 0.02
    qkv, up = first["layer_0"]["attention"]["qkv"], first["layer_0"]["mlp"]["up"]
    for matrix, rate in ((qkv[0], 0.05), (qkv[1], 0.05), (qkv[2], 0.05), (up, 0.1)):
        assert 0.7 < np.median(np.linalg.svd(np.asarray(matrix), compute_uv=False)) / rate < 1.2


def test_zero_gradients_move_nothing():
    """At any step, in any group."""
    gradients = jax.tree.map(jnp.zeros_like, constant_gradient())
    optimizer = make_optimizer(OPTIMIZER, steps=5)
    state = optimizer.init(gradients)
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, gradients)
        for moved in jax.tree.leaves(updates):
            np.testing.assert_array_equal(moved, 0)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    """Sums or means, within reason: epsilons are far below any gradient."""
    gradients = constant_gradient()
    optimizer = make_optimizer(OPTIMIZER, steps=5)
    state = optimizer.init(gradients)
    expected, _ = optimizer.update(gradients, state, gradients)
    updates, _ = optimizer.update(jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients), state, gradients)
    for moved, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
        assert relative_error(moved, other) < 0.02
