"""Adam as the newer recipes use it: moments in float32 whatever the weights are, updates at every second step only."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

from senano_jax.config import changed, settings
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.optim.config import AdamRule, Cooldown, Recipe
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset

CONSTANT = Cooldown(fraction=0.0, floor=1.0)
RULE = AdamRule(rate=0.1, b1=0.8, b2=0.9, eps=1e-10)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "data/adam.npz") as file:
        return json.loads(str(file["meta"])), {name: file[name] for name in file.files if name != "meta"}


def drawn(seed, shape, scale=1.0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)


def run(recipe, params, gradients, steps=10, **arguments):
    """Yields the parameters and the state after each step, compiled."""
    optimizer = make_optimizer(recipe, steps)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params, **arguments)
        params = optax.apply_updates(params, updates)
        yield params, state


def adam_of(meta, group, **options):
    about = meta["groups"][group]
    return AdamRule(meta["lr"] * about["lr_mul"], *about["betas"], meta["eps"], **options)


@pytest.mark.parametrize("group", ["table", "head", "gate", "scalars"])
def test_float32_weights_are_the_original_program(reference, group):
    """After one step and after five, at the rates and betas of four of its groups."""
    meta, arrays = reference
    about = meta["groups"][group]
    start = {"x": jnp.asarray(drawn(about["weight_seed"], about["shape"], about["weight_scale"]))}
    gradients = [{"x": drawn(seed, about["shape"])} for seed in about["grad_seeds"]]
    history = list(run(Recipe(adam_of(meta, group), CONSTANT), start, gradients))
    for steps in (1, 5):
        params, _ = history[steps - 1]
        assert relative_error(params["x"], arrays[f"{group}__f32__gs1__wd0__s{steps}__w"]) < 1e-6


@pytest.mark.parametrize("group", ["table", "head", "gate", "scalars"])
def test_bfloat16_weights_with_float32_moments_are_the_original_program(reference, group):
    """Weights after one step and after five within a unit in their last place, moments as exact as float32; moments in
    the type of the weights are not. The file has the moments of a run whose weights decay, which they know nothing
    of."""
    meta, arrays = reference
    about = meta["groups"][group]
    rule = adam_of(meta, group, state="float32")
    start = {"x": jnp.asarray(drawn(about["weight_seed"], about["shape"], about["weight_scale"]), jnp.bfloat16)}
    gradients = [{"x": jnp.asarray(drawn(seed, about["shape"]), jnp.bfloat16)} for seed in about["grad_seeds"]]
    for steps, (params, state) in enumerate(run(Recipe(rule, CONSTANT), start, gradients), 1):
        if steps in (1, 5):
            weights, moments = (f"{group}__bf16__gs1__wd{decays}__s{steps}__" for decays in (0, 1))
            np.testing.assert_allclose(params["x"].astype(jnp.float32), arrays[weights + "w"], rtol=2**-7, atol=1e-7)
            for kept, name in ((state[0].mean["x"], "m"), (state[0].square["x"], "v")):
                assert kept.dtype == jnp.float32
                assert relative_error(kept, arrays[moments + name]) < 1e-6
    *_, (_, state) = run(changed(Recipe(rule, CONSTANT), {"matrices.state": "parameters"}), start, gradients)
    assert state[0].mean["x"].dtype == jnp.bfloat16
    assert relative_error(state[0].mean["x"], arrays[moments + "m"]) > 1e-4


def test_every_second_step_takes_the_sum_of_two_gradients():
    """As the same rule would that saw a run of half as many steps with the sums; nothing moves in between. Decay, the
    schedule of the step at which it updates, and the rate given with that step included."""
    rng = np.random.default_rng(0)
    params = {"x": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
    gradients = [{"x": rng.standard_normal((4, 3)).astype(np.float32)} for _ in range(8)]
    m = v = 0.0
    x = np.asarray(params["x"], np.float64)
    rule = changed(RULE, {"every": 2, "decay": 0.1})
    recipe = Recipe(rule, Cooldown(fraction=0.5, floor=0.2))
    for step, (moved, _) in enumerate(run(recipe, params, gradients, steps=8, rate=0.5)):
        if step % 2:
            g = gradients[step - 1]["x"].astype(np.float64) + gradients[step]["x"]
            t = (step + 1) // 2
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            left = min(1, (1 - step / 8) / 0.5)
            adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-10)
            x = x - 0.5 * 0.1 * (left + (1 - left) * 0.2) * (adam + 0.1 * x)
        assert relative_error(moved["x"], x) < 1e-6


def test_it_is_the_original_program(reference):
    """Eight steps of its tables and scalars among Muon's matrices: the scalars, whose weights do not decay there, and
    moments and updates of both counted after the last."""
    meta, arrays = reference
    places = {"value_embeds": "value_embedding_0", "scalars": "skip_weights"}
    params = {place: jnp.asarray(drawn(*meta["whole"]["seeds_weight"][name])) for name, place in places.items()}
    gradients = [
        {
            place: drawn(meta["whole"]["seeds_grad"][name][0] * 100 + step, params[place].shape)
            for name, place in places.items()
        }
        for step in range(8)
    ]
    scalars, tables = (adam_of(meta, group, every=2) for group in ("scalars", "table"))
    recipe = Recipe(preset("recurrent").optimizer.matrices, CONSTANT, scalars=scalars, tables=tables)
    history = list(run(recipe, params, gradients))
    for step in (0, 1, 2, 3, 5, 7):
        moved, _ = history[step]
        assert relative_error(moved["skip_weights"], arrays[f"all__f32__step{step}__scalars"]) < 1e-6
    for name, place, label in (("value_embeds", "value_embedding_0", "tables"), ("scalars", "skip_weights", "scalar")):
        adam = history[-1][1].inner_states[label].inner_state[0].inner_opt_state[0]
        assert adam.count == arrays[f"all__f32__step7__{name}__t"] == 4
        assert relative_error(adam.mean[place], arrays[f"all__f32__step7__{name}__m"]) < 1e-6
        assert relative_error(adam.square[place], arrays[f"all__f32__step7__{name}__v"]) < 1e-6


def test_never_is_refused():
    """A step in none."""
    with pytest.raises(UserError, match=r"--optimizer.head.every is 0; it must be at least 1"):
        check_config(changed(preset("recurrent"), {"optimizer.head.every": 0}))


def test_the_preset_differs_from_cautious_decay_in_its_adam_alone():
    """In types of moments, and in how often it updates."""
    plain, new = settings(preset("cautious-decay")), settings(preset("rare-adam"))
    groups = ("head", "embeddings", "scalars")
    assert {name: new[name] for name in new if new[name] != plain[name]} == (
        {f"optimizer.{group}.state": "float32" for group in groups} | {f"optimizer.{g}.every": 2 for g in groups}
    )
