"""Muon: momentum, orthogonalisation matrix by matrix, scale, and sharing the work over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracles import newton_schulz, relative_error

from senano_jax.optim.muon import orthogonalized, scale_by_muon
from senano_jax.optim.newton_schulz import ITERATIONS

QUINTIC = orthogonalized(ITERATIONS["newton-schulz"])
SHAPES = {"qkv": (3, 32, 32), "out": (32, 32), "up": (32, 128), "down": (128, 32)}


def momentum(step):
    return 0.85 + 0.02 * step


def random_gradients(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def published_step(average, gradient, mu):
    """One matrix in the PyTorch layout, (out, in); returns the new average and the step for a rate of 1."""
    average = mu * average + (1 - mu) * gradient
    direction = (1 - mu) * gradient + mu * average
    rows, columns = direction.shape
    return average, max(1, rows / columns) ** 0.5 * newton_schulz(direction)


def test_three_steps_follow_the_published_rule():
    """Against float64 NumPy in the PyTorch layout; q, k and v each by themselves; momentum by the schedule."""
    optimizer = scale_by_muon(momentum, QUINTIC)
    state = optimizer.init(random_gradients(0))
    averages = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(3):
        gradients = random_gradients(step)
        updates, state = jax.jit(optimizer.update)(gradients, state)
        for name, gradient in gradients.items():
            stacked = np.asarray(gradient, np.float64).reshape(-1, *gradient.shape[-2:])
            pairs = [
                published_step(average.T, g.T, momentum(step))
                for average, g in zip(averages[name].reshape(stacked.shape), stacked)
            ]
            averages[name] = np.stack([average.T for average, _ in pairs]).reshape(gradient.shape)
            expected = np.stack([move.T for _, move in pairs]).reshape(gradient.shape)
            assert updates[name].dtype == jnp.float32
            assert relative_error(updates[name], expected) < 0.02  # the iteration runs in bfloat16
            assert relative_error(state.momentum[name], averages[name]) < 1e-6


def test_the_up_projection_moves_twice_as_far():
    """It has four times as many outputs as inputs: its singular values end near sqrt(4), all others near 1."""
    optimizer = scale_by_muon(momentum, QUINTIC)
    gradients = random_gradients(1)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    for name, update in updates.items():
        singular = np.linalg.svd(np.asarray(update), compute_uv=False) / (2 if name == "up" else 1)
        assert 0.7 < np.median(singular) < 1.2  # the least one of a square random matrix may still be small
        assert singular.max() < 1.3


def test_q_k_and_v_are_orthogonalised_separately():
    """Enlarging q's gradient a thousandfold, or silencing it, leaves the steps of k and v as they are."""
    optimizer = scale_by_muon(momentum, QUINTIC)
    gradients = random_gradients(2)
    state = optimizer.init(gradients)
    expected = optimizer.update(gradients, state)[0]["qkv"]
    for factor in (1e3, 0.0):
        changed = gradients | {"qkv": gradients["qkv"].at[0].multiply(factor)}
        updates = optimizer.update(changed, state)[0]["qkv"]
        np.testing.assert_array_equal(updates[1:], expected[1:])
    assert relative_error(np.asarray(expected).reshape(96, 32), newton_schulz(gradients["qkv"].reshape(96, 32))) > 0.1


def test_a_zero_gradient_gives_a_zero_step():
    """As the projections behind a zero head get at step 0: no NaN from 0 / 0."""
    optimizer = scale_by_muon(momentum, QUINTIC)
    zeros = jax.tree.map(jnp.zeros_like, random_gradients(0))
    updates, state = optimizer.update(zeros, optimizer.init(zeros))
    for update in (*updates.values(), *state.momentum.values()):
        np.testing.assert_array_equal(update, 0)


def test_averages_keep_their_type():
    """They are float32, also of gradients that are not; a checkpoint of another type could not be read again."""
    gradients = {"up": jnp.ones((2, 3), jnp.bfloat16)}
    optimizer = scale_by_muon(lambda step: jnp.float32(0.9), QUINTIC)
    state = optimizer.init(gradients)
    _, new = optimizer.update(gradients, state)
    assert state.momentum["up"].dtype == new.momentum["up"].dtype == jnp.float32


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_sharing_the_work_over_devices_changes_nothing(layers):
    """Eight devices with equal gradients return what one returns. 2 layers: 8 square matrices and 4 of the others, of
    which 8 divides only the former; 4 layers: both; 3 layers: neither, so that zeros fill them up."""
    shapes = {f"{name}{n}": shape for n in range(layers) for name, shape in SHAPES.items()}
    gradients = random_gradients(3, shapes)
    alone = scale_by_muon(momentum, QUINTIC)
    state = alone.init(gradients)
    expected, expected_state = jax.jit(alone.update)(gradients, state)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    shared = jax.shard_map(
        scale_by_muon(momentum, QUINTIC, "data").update,
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    updates, new_state = jax.jit(shared)(gradients, state)
    for name in shapes:
        assert relative_error(updates[name], expected[name]) < 1e-3
        assert relative_error(new_state.momentum[name], expected_state.momentum[name]) < 1e-6
        shards = [np.asarray(shard.data) for shard in updates[name].addressable_shards]
        assert len(shards) == 8
        for shard in shards[1:]:
            np.testing.assert_array_equal(shard, shards[0])


@pytest.mark.parametrize("layers", [4, 3])
def test_only_a_share_of_the_work_is_done_on_each_device(layers):
    """With four layers on eight devices each multiplies 2 square and 1 oblong matrices, not 16 and 8; with three as
    many, zeros among them."""
    shapes = {f"{name}{n}": shape for n in range(layers) for name, shape in SHAPES.items()}
    gradients = random_gradients(4, shapes)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))

    def flops(axis_name):
        optimizer = scale_by_muon(momentum, QUINTIC, axis_name)
        update = jax.shard_map(optimizer.update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return jax.jit(update).lower(gradients, optimizer.init(gradients)).compile().cost_analysis()["flops"]

    assert flops("data") < 0.25 * flops(None)
