"""Which rule moves which parameter, how far, and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

from senano_jax.model.build import abstract_params, make_model
from senano_jax.optim.groups import GROUPS, parameter_group
from senano_jax.optim.recipe import make_optimizer, schedule_values
from senano_jax.optim.schedules import learning_rate_factor
from senano_jax.presets import PRESETS, preset

OPTIMIZER = preset("recurrent").optimizer
MODELS = {(preset(name).model, preset(name).dtype): name for name in PRESETS}  # one preset for each model


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
        groups.setdefault(OPTIMIZER.leader(parameter_group(path)), []).append((path[-1].key, leaf.ndim))
    assert {group: len(members) for group, members in groups.items()} == {
        "matrices": muon,
        "embeddings": embed,
        "head": 1,
        "scalars": scalar,
    }
    mixing = "value_lambdas" if name == "value-embeddings" else "value_residual"
    assert {key for key, _ in groups["matrices"]} == {"qkv", "out", "up", "down"}
    assert {key for key, _ in groups["scalars"]} == {"lambdas", mixing, "skip_weights"}


def path(*names):
    return tuple(jax.tree_util.DictKey(name) for name in names)


@pytest.mark.parametrize("name", MODELS.values())
def test_every_parameter_of_every_preset_belongs_to_one_group(name):
    """And what Muon may take has rows and columns."""
    config = preset(name)
    for names, leaf in jax.tree.leaves_with_path(abstract_params(make_model(config.model, config.dtype))):
        group = parameter_group(names)
        assert group in GROUPS
        assert leaf.ndim >= 2 or group == "scalars"


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        (("layer_0", "attention", "mixer"), "no group"),
        (("layer_0", "head"), "no group"),
        (("bias_embedding",), "no group"),
        (("layer_0", "attention", "qkv", "gain"), "no group"),
    ],
)
def test_a_parameter_of_no_group_is_refused(name, fitting):
    """By its path, when the state is made, so that no parameter gets another kind's rule in silence."""
    params = {"embedding": jnp.zeros((4, 3)), "head": jnp.zeros((3, 4))}
    place = params
    for part in name[:-1]:
        place = place.setdefault(part, {})
    place[name[-1]] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=f"parameter {'/'.join(name)} fits the patterns of {fitting}"):
        make_optimizer(OPTIMIZER, 5).init(params)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("value_embedding_0",), "tables"),
        (("layer_1", "attention", "head_gate"), "gates"),
        (("loop", "layer_1", "attention", "head_gate", "gate"), "gates"),
        (("loop", "layer_1", "mlp", "down"), "matrices"),
    ],
)
def test_groups_that_follow_another_until_they_have_a_rule_of_their_own(names, group):
    """Tables of values follow the embeddings, gates the scalars; matrices are themselves."""
    followed = {"tables": "embeddings", "gates": "scalars", "matrices": "matrices"}
    assert parameter_group(path(*names)) == group
    assert OPTIMIZER.leader(group) == followed[group]
    rule = dataclasses.replace(OPTIMIZER.scalars, rate=0.5)
    own = dataclasses.replace(OPTIMIZER, tables=rule, gates=rule)
    assert own.leader(group) == group
    one = dataclasses.replace(OPTIMIZER, head=None, embeddings=None, scalars=None)
    assert one.leader(group) == "matrices"


def test_a_group_with_a_rule_of_its_own_moves_by_its_rate():
    """Here the gates and the tables, beside scalars and embeddings that move by theirs."""
    rng = np.random.default_rng(0)
    names = {"head_gate": 0.5, "skip_weights": 0.04, "value_embedding_0": 0.125, "embedding": 0.6}
    gradients = {name: jnp.asarray(rng.standard_normal((4, 4)), jnp.float32) for name in names}
    recipe = dataclasses.replace(
        OPTIMIZER,
        gates=dataclasses.replace(OPTIMIZER.scalars, rate=0.5),
        tables=dataclasses.replace(OPTIMIZER.scalars, rate=0.125),
    )
    optimizer = make_optimizer(recipe, 5)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    for name, rate in names.items():
        np.testing.assert_allclose(updates[name], -rate * np.sign(gradients[name]), rtol=1e-5)


@pytest.mark.parametrize("name", ["recurrent", "llmc"])
def test_a_rate_given_with_the_step_multiplies_all_rates(name):
    """Traced or not, in every group, decay included; and without one nothing is multiplied."""
    gradients = constant_gradient()
    optimizer = make_optimizer(preset(name).optimizer, steps=2000)
    state = optimizer.init(gradients)
    expected, expected_state = optimizer.update(gradients, state, gradients, tokens=10, rate=None)
    half, state = jax.jit(
        lambda rate: optimizer.update(gradients, optimizer.init(gradients), gradients, tokens=10, rate=rate)
    )(0.5)
    for moved, other in zip(jax.tree.leaves(half), jax.tree.leaves(expected)):
        assert relative_error(moved, 0.5 * other) < 1e-5
    for kept, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state)):
        assert relative_error(kept, other) < 1e-6


def test_the_log_records_the_schedules():
    """The factor of the learning rates of every step, and Muon's momentum; AdamW has none."""
    values = schedule_values(OPTIMIZER, 1700)
    assert values.keys() == {"lr", "momentum"}
    for step in (0, 150, 1020, 1021, 1699):
        assert values["lr"][step] == learning_rate_factor(step, 1700, OPTIMIZER.schedule)
        assert values["momentum"][step] == pytest.approx(min(0.95, 0.85 + step / 3000))
    assert schedule_values(preset("llmc").optimizer, 5).keys() == {"lr"}


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
        factor = float(learning_rate_factor(step, 5, OPTIMIZER.schedule))
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
