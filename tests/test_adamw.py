"""AdamW over summed gradients, against the formula in float64 and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle_gpt2 import adamw_step, cosine_lr, global_norm_clip
from oracles import relative_error

from senano_jax.config import changed
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset

CONFIG = changed(preset("llmc").optimizer, {"matrices.rate": 0.01, "schedule.warmup_steps": 4})
RULE, WARMUP_STEPS = CONFIG.matrices, CONFIG.schedule.warmup_steps
STEPS, TOKENS = 12, 1000
SHAPES = {"matrix": (30, 20), "bias": (20,)}


@pytest.fixture(scope="module")
def trajectory():
    """Weights; gradients of the mean loss, norms from far below the clip to far above it; weights after each step."""
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    norms = 10.0 ** rng.uniform(-2, 1.5, STEPS)
    gradients = [
        {name: (norm / 25 * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}
        for norm in norms
    ]
    optimizer = make_optimizer(CONFIG, STEPS)
    params, state, after = jax.tree.map(jnp.asarray, start), optimizer.init(start), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        summed = jax.tree.map(lambda g: TOKENS * g, gradient)
        updates, state = update(summed, state, params, tokens=TOKENS)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return start, gradients, after


def test_it_is_the_formula(trajectory):
    """Mean, clip, bias-corrected moments, epsilon outside the root, decay of the matrix alone, warm-up and cosine."""
    params, gradients, after = trajectory
    params = {name: array.astype(np.float64) for name, array in params.items()}
    m = v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    clipped_steps = 0
    for step, (gradient, ours) in enumerate(zip(gradients, after)):
        gradient, norm = global_norm_clip(
            {name: g.astype(np.float64) for name, g in gradient.items()}, CONFIG.clip_norm
        )
        clipped_steps += norm > CONFIG.clip_norm
        rate = cosine_lr(step, STEPS, RULE.rate, WARMUP_STEPS)
        params, m, v = adamw_step(params, gradient, m, v, step + 1, rate)
        for name, expected in params.items():
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-6)
    assert 0 < clipped_steps < STEPS


def test_it_is_pytorch(trajectory):
    """Its AdamW with a group that decays and one that does not, and its clip_grad_norm_."""
    torch = pytest.importorskip("torch")
    start, gradients, after = trajectory
    params = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in start.items()}
    groups = [
        {"params": [params["matrix"]], "weight_decay": RULE.decay},
        {"params": [params["bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(RULE.b1, RULE.b2), eps=RULE.eps)
    for step, (gradient, ours) in enumerate(zip(gradients, after)):
        for name, parameter in params.items():
            parameter.grad = torch.from_numpy(gradient[name].copy())
        torch.nn.utils.clip_grad_norm_(params.values(), CONFIG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, STEPS, RULE.rate, WARMUP_STEPS)
        optimizer.step()
        for name, parameter in params.items():
            assert relative_error(ours[name], parameter.detach().numpy()) < 2e-6


def test_embeddings_decay_and_one_dimensional_tensors_do_not():
    """Under gradients of zero every matrix and table shrinks by rate x decay, and nothing else moves."""
    params = {"embedding": jnp.ones((4, 3)), "layer_0": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
    optimizer = make_optimizer(changed(CONFIG, {"schedule.warmup_steps": 0}), STEPS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, tokens=TOKENS)
    for moved, parameter in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        np.testing.assert_allclose(moved, -0.01 * 0.1 if parameter.ndim >= 2 else 0, rtol=1e-6)


def test_the_number_of_tokens_does_not_matter():
    """Twice the sum over twice the tokens is the same step: a step may be split or enlarged."""
    params = {"matrix": jnp.ones((4, 3))}
    gradients = {"matrix": jnp.arange(12.0).reshape(4, 3)}
    optimizer = make_optimizer(CONFIG, STEPS)
    state = optimizer.init(params)
    once, _ = optimizer.update(gradients, state, params, tokens=10)
    twice, _ = optimizer.update(jax.tree.map(lambda g: 2 * g, gradients), state, params, tokens=20)
    np.testing.assert_array_equal(once["matrix"], twice["matrix"])
