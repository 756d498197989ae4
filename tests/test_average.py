"""The tail average of the weights and its read-out, against float64 and against the original program's numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

from senano_jax.config import changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.average import AverageState, read_out, with_tail_average
from senano_jax.optim.config import TailAverage
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset

SETTINGS = TailAverage(start=0.4, horizon=0.5, share=0.6, groups=("head", "scalars"))
STEPS = 10


def run(optimizer, params, gradients):
    """Yields the state and the parameters after each update, compiled."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield state, params


def random_trees(seed=0):
    """Parameters of an averaged and of another type and group, and gradients of all steps."""
    rng = np.random.default_rng(seed)

    def tree():
        return {
            "embedding": jnp.asarray(rng.standard_normal((5, 4)), jnp.bfloat16),
            "head": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
            "layer_0": {"lambdas": jnp.asarray(rng.standard_normal(2), jnp.float32)},
        }

    return tree(), [tree() for _ in range(STEPS)]


def test_it_is_the_formula():
    """A copy up to step 4 of 10, then a fifth of the way to the weights at every step; both are blended from step 4 on.
    The embedding, which is of no averaged group, is read out as it is."""
    optimizer, average = with_tail_average(optax.sgd(0.1), SETTINGS, STEPS), None
    for step, (state, params) in enumerate(run(optimizer, *random_trees()), 1):
        weights = np.asarray(params["head"], np.float64)
        average = weights if step <= 4 else average + (weights - average) / 5
        result = read_out(state, params)
        expected = weights if step < 4 else 0.4 * weights + 0.6 * average
        assert relative_error(result["head"], expected) < 1e-6
        assert relative_error(state.average["head"], average) < 1e-6
        np.testing.assert_array_equal(result["embedding"], params["embedding"])
        if step < 4:
            np.testing.assert_array_equal(result["layer_0"]["lambdas"], params["layer_0"]["lambdas"])
    assert relative_error(result["head"], params["head"]) > 1e-3
    assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(lambda x: x.dtype, params)
    assert step == STEPS


def test_it_is_the_original_program():
    """Steps 1 to 6 of the recorded run, in which the average starts after step 1 (counted from 0), and its read-out."""
    with np.load(Path(__file__).parent / "data/tail_average.npz") as ref:
        meta = json.loads(str(ref["meta"]))
        assert (meta["tau"], meta["start"], meta["blend"]) == (150, 2, 0.6)

        def drawn(seed, scale):
            return np.random.RandomState(seed).standard_normal((5, 3)).astype(np.float32) * np.float32(scale)

        settings = TailAverage(start=2 / 1500, horizon=0.1, share=0.6, groups=("head",))
        optimizer = with_tail_average(optax.identity(), settings, 1500)
        moves = [{"head": drawn(44300 + step, 0.1)} for step in range(7)]
        for step, (state, _) in enumerate(run(optimizer, {"head": jnp.asarray(drawn(442, 1))}, moves)):
            if step >= 1:
                assert relative_error(state.average["head"], ref[f"step{step}__a"]) < 1e-6
        # the original stops its average here, and moves twice more
        state = state._replace(average={"head": jnp.asarray(ref["step8__a"])})
        assert relative_error(read_out(state, {"head": ref["w_last"]})["head"], ref["readout"]) < 1e-6


def test_a_recipe_with_an_average_takes_the_same_steps():
    """Bit for bit; its state holds the average beside the state of the same recipe without one."""
    recipe = preset("recurrent").optimizer
    params, gradients = random_trees()
    plain = list(run(make_optimizer(recipe, STEPS), params, gradients))
    averaged = list(run(make_optimizer(changed(recipe, {"average": SETTINGS}), STEPS), params, gradients))
    for (state, params), (with_average, same) in zip(plain, averaged):
        jax.tree.map(np.testing.assert_array_equal, (state, params), (with_average.inner, same))
        assert read_out(state, params) is params
    assert isinstance(with_average, AverageState)
    assert relative_error(read_out(with_average, same)["head"], same["head"]) > 1e-4


def test_an_average_of_nothing_known_is_refused():
    """With the groups there are."""
    config = changed(preset("recurrent"), {"optimizer.average": SETTINGS})
    check_config(config)
    with pytest.raises(UserError, match=r"--optimizer.average.groups names 'heads'; the groups are matrices, head"):
        check_config(changed(config, {"optimizer.average.groups": ("head", "heads")}))
    with pytest.raises(UserError, match=r"--optimizer.average.share is 1.5; use a number from 0 to 1"):
        check_config(changed(config, {"optimizer.average.share": 1.5}))
