"""A recipe of all that there is: it trains a small model, and its state comes back from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_sequences

from senano_jax.config import changed
from senano_jax.model.build import make_model
from senano_jax.optim.average import AverageState, read_out
from senano_jax.optim.config import AdamRule, TailAverage
from senano_jax.optim.muon import StackedMuonState
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch
from senano_jax.training.state import abstract_state, init_state
from senano_jax.training.step import make_train_step

STEPS = 6
RECIPE = changed(
    preset("rare-adam").optimizer,
    {
        "matrices.query_key_columns": 16,
        "tables": AdamRule(rate=0.3, b1=0.75, b2=0.95, eps=1e-10, decay=0.025, every=2),
        "average": TailAverage(start=0.5, horizon=0.5, share=0.5, groups=("matrices", "head", "scalars")),
    },
)


@pytest.fixture(scope="module")
def trained():
    """Model, optimiser, mesh of two devices, losses, and the states after four steps and after six."""
    model, mesh = make_model(changed(TINY, {"value_embeddings": 1}), "bfloat16"), make_mesh(2)
    optimizer = make_optimizer(RECIPE, STEPS, DATA_AXIS)
    step, state = make_train_step(model, optimizer, mesh), init_state(model, optimizer, 0, mesh)
    batch, losses, states = place_batch(mesh, random_sequences(4, 256), 1), [], []
    for _ in range(STEPS):
        state, metrics = step(state, batch, 2)
        losses.append(float(metrics.loss))
        states.append(jax.tree.map(np.asarray, state))
    return model, optimizer, mesh, step, batch, losses, states


def test_it_learns_what_it_sees_again(trained):
    """The same four sequences at every step; what is read out differs from the last weights where they are averaged."""
    *_, losses, states = trained
    assert losses[-1] < losses[0] - 0.1
    params, opt_state = states[-1].params, states[-1].opt_state
    assert isinstance(opt_state, AverageState)
    assert isinstance(opt_state.inner.inner_states["muon"].inner_state[0], StackedMuonState)
    result = read_out(opt_state, params)
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(result["embedding"], params["embedding"])
    assert np.any(result["head"] != params["head"])


def test_its_state_comes_back_from_a_checkpoint_and_goes_on(trained, tmp_path):
    """Averages, stacks, sums of gradients and counts, to the last bit; and so are the steps after it."""
    model, optimizer, mesh, step, batch, losses, states = trained
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, jax.device_put(states[3]), {"step": 4})
        restored, _ = checkpoints.restore(4, abstract_state(model, optimizer), mesh)
    jax.tree.map(np.testing.assert_array_equal, restored, states[3])
    for number in (4, 5):
        restored, metrics = step(restored, batch, 2)
        assert float(metrics.loss) == losses[number]
    jax.tree.map(np.testing.assert_array_equal, restored, states[-1])
