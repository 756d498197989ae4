"""Our program against numbers of the PyTorch program: same weights, same tokens, same schedule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from senano_jax.model.gpt import Gpt
from senano_jax.optim.recipe import make_optimizer
from senano_jax.optim.schedules import learning_rate_factor, ramp
from senano_jax.plan import window_blocks
from senano_jax.presets import preset
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState
from senano_jax.training.step import make_train_step

FLOAT32 = ("recurrent", "no_value_embeddings")
BFLOAT16 = "recurrent_bf16"
OPTIMIZER = preset("recurrent").optimizer
FINAL_WINDOW = preset("recurrent").final_window_tokens
# These models have the whole vocabulary: most of their time is computation, not compilation as elsewhere (conftest.py).
OPTIMISED = {"xla_backend_optimization_level": 1, "xla_backend_extra_options": ""}


@dataclasses.dataclass
class Replay:
    """What the training step made of a reference file, one compilation for all of it."""

    name: str
    ref: reference.Reference
    gradients: dict[str, np.ndarray]  # of the summed loss of the first sequence at window 4
    losses: list[float]
    norms: dict[int, dict[str, float]]  # of the parameters after a number of steps
    params: Any  # after the last step; in NumPy, as those of the file: mean_loss is compiled once for both


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on and leaves them in its state."""

    def update(gradients, state, params=None):
        return gradients, gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def scanned(ref: reference.Reference) -> Gpt:
    """The model with its loop as a loop: quicker to compile, and the same function as unrolled (test_gpt.py)."""
    return Gpt(dataclasses.replace(ref.config, unroll=False), ref.dtype)


@functools.cache
def mean_loss(name: str):
    """A jitted (params, sequences [B, T + 1], window) -> mean loss."""
    model = scanned(reference.load(name))

    @jax.jit
    def loss(params, sequences, window):
        targets = sequences[:, 1:]
        return model.apply({"params": params}, sequences[:, :-1], targets, window) / targets.size

    return loss


def replay(name: str, steps: int) -> Replay:
    ref = reference.load(name)
    meta, mesh = ref.meta, make_mesh(1)
    model = scanned(ref)
    optimizer = optax.chain(keep_gradients(), make_optimizer(OPTIMIZER, meta["num_iterations"], DATA_AXIS))
    # Still one trace and one compilation: inside, whatever differs between steps is an array that is not known.
    train_step = jax.jit(make_train_step(model, optimizer, mesh), donate_argnums=0, compiler_options=OPTIMISED)

    def fresh_state():
        params = jax.tree.map(np.array, ref.params)  # the step consumes its state
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        return jax.device_put(state, replicated(mesh))

    def step(state, sequences, window):
        state, metrics = train_step(state, place_batch(mesh, sequences, meta["accum"]), window)
        return state, float(metrics.loss)

    # The step takes two sequences: the same one twice has twice its gradient, exactly, and its mean loss.
    state, _ = step(fresh_state(), np.repeat(ref.sequences(0, 1), 2, axis=0), 4)
    gradients = {key: array / 2 for key, array in ref.torch_view(state.opt_state[0]).items()}
    state, losses, norms = fresh_state(), [], {}
    for k in range(steps):
        window = window_blocks(k, meta["num_iterations"], FINAL_WINDOW)
        state, loss = step(state, ref.sequences(k * meta["accum"], meta["accum"]), window)
        losses.append(loss)
        norms[k + 1] = {key: float(np.linalg.norm(array)) for key, array in ref.torch_view(state.params).items()}
    assert train_step._cache_size() == 1
    return Replay(name, ref, gradients, losses, norms, jax.tree.map(np.asarray, state.params))


@pytest.fixture(scope="module", params=FLOAT32)
def run(request) -> Replay:
    return replay(request.param, steps=6)


@pytest.fixture(scope="module")
def bfloat16_run() -> Replay:
    return replay(BFLOAT16, steps=3)


def assert_norms(norms: dict[str, Any], expected: dict[str, float], tolerance: float):
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        assert norm == pytest.approx(expected[name], rel=tolerance), name  # a norm of 0 must be 0


def gradient_norms(run: Replay) -> dict[str, float]:
    return {name: float(np.linalg.norm(gradient)) for name, gradient in run.gradients.items()}


@pytest.mark.parametrize("name", [*FLOAT32, BFLOAT16])
def test_the_schedules_are_those_recorded(name):
    """Window, rate factor and Muon's momentum of every step."""
    meta = reference.load(name).meta
    for recorded in meta["train"]:
        step, steps = recorded["step"], meta["num_iterations"]
        assert window_blocks(step, steps, FINAL_WINDOW) == recorded["window_blocks"]
        assert float(learning_rate_factor(step, steps, OPTIMIZER.schedule)) == pytest.approx(recorded["lr"], rel=1e-6)
        assert float(ramp(step, OPTIMIZER.matrices.momentum)) == pytest.approx(recorded["momentum"], rel=1e-6)


@pytest.mark.parametrize("name", FLOAT32)
def test_forward_losses_at_every_window(name):
    """Mean loss of 1,024 tokens within 1e-5, one compilation for all windows. They differ by 1e-4 between windows."""
    ref = reference.load(name)
    loss = mean_loss(name)
    for window, expected in ref.meta["forward_mean_loss_by_window_blocks"].items():
        assert float(loss(ref.params, ref.sequences(0, 1), int(window))) == pytest.approx(expected, rel=1e-5)
    assert loss._cache_size() == 1


def test_gradients(run):
    """Of every tensor the norm within 1e-3 and the leading entries within 1e-3 of the largest of them, or of the
    tensor's typical entry where they are smaller."""
    meta = run.ref.meta
    assert_norms(gradient_norms(run), meta["grad_norm"], 1e-3)
    for name, gradient in run.gradients.items():
        expected = run.ref.arrays[f"grad8/{name}"]
        typical = meta["grad_norm"][name] / np.sqrt(gradient.size)
        np.testing.assert_allclose(
            gradient.ravel()[:8], expected, rtol=0, atol=1e-3 * max(np.abs(expected).max(), typical), err_msg=name
        )


def test_training_losses(run):
    """Of six steps with growing windows, falling rates and rising momentum, within 1e-3."""
    expected = [recorded["mean_loss"] for recorded in run.ref.meta["train"]]
    assert run.losses == pytest.approx(expected, rel=1e-3)


def test_parameters_after_one_and_after_six_steps(run):
    """Norms within 1e-3 and 2e-2: Newton-Schulz runs in bfloat16, and six steps at full rate amplify its rounding."""
    assert_norms(run.norms[1], run.ref.meta["param_norm_after_step1"], 1e-3)
    assert_norms(run.norms[6], run.ref.meta["param_norm_after_step6"], 2e-2)


def test_held_out_loss_after_training(run):
    """Of a sequence that was not trained on, at a window that did not occur, within 2e-3."""
    meta = run.ref.meta
    held_out = mean_loss(run.name)(run.params, run.ref.sequences(len(meta["train"]) * meta["accum"], 1), 8)
    assert held_out == pytest.approx(meta["held_out_mean_loss_after_training"], rel=2e-3)


def test_bfloat16_gradients(bfloat16_run):
    """With zero head and zero projections only the head has a gradient at step 0; its norm within 2e-3."""
    expected = bfloat16_run.ref.meta["grad_norm"]
    assert {name for name, norm in expected.items() if norm} == {"lm_head.weight"}
    assert_norms(gradient_norms(bfloat16_run), expected, 2e-3)


def test_bfloat16_training_losses(bfloat16_run):
    """Within 1e-3 while the model is near its start, and 2e-2 at step 2, after two steps at full rate:
    the arrays are of the program not compiled, which rounds more often."""
    expected = [recorded["mean_loss"] for recorded in bfloat16_run.ref.meta["train"]]
    assert bfloat16_run.losses[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert bfloat16_run.losses[2] == pytest.approx(expected[2], rel=2e-2)


def test_bfloat16_parameters_after_one_step(bfloat16_run):
    """Norms within 1e-3."""
    assert_norms(bfloat16_run.norms[1], bfloat16_run.ref.meta["param_norm_after_step1"], 1e-3)
