"""The loss's kernel for Hopper GPUs: interpreted, on such a GPU, its short floats, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from logit_rows import CAP, HALF_ULP, SLOPE, expected, inputs, several

from senano_jax.model import hopper_loss
from senano_jax.model.hopper_loss import LINE, STEP, WARPGROUPS, Short, short_for
from senano_jax.model.loss_kernel import logsumexp_and_gradient

APPROXIMATE = {"others": 1e-4, "of_sigmoid": 1e-7}  # exponentials, roots
THIRDS = WARPGROUPS * LINE  # logits in one line of each warpgroup
NO_GPU = jax.default_backend() != "gpu"
on_hopper = pytest.mark.skipif(not hopper_loss.runs_here(), reason="needs a Hopper GPU and JAX 0.11")
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not NO_GPU,
    reason="JAX 0.10 interprets no such kernels, and a GPU runs the kernel itself",
)


def run(z, targets, weights=None, **options):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return logsumexp_and_gradient(z, targets, weights, slope=SLOPE, implementation="hopper", **options)


def check(results, z, targets, weights=None, shift=0.0, cap=CAP, others=2e-5, of_sigmoid=2e-8):
    """Each number of the gradient is rounded to a short float and to bfloat16. `others` are its other errors, beside
    that of a sigmoid near 1."""
    logsumexp, dz = (np.asarray(result, np.float64) for result in results)
    reference, d_reference = expected(z, targets, weights, shift, cap)
    np.testing.assert_allclose(logsumexp, reference, rtol=1e-5)
    of_short = 2.0 ** (short_for(cap * np.log2(np.e)).exponent_bits - 17)
    np.testing.assert_allclose(dz, d_reference, rtol=HALF_ULP + of_short + others, atol=of_sigmoid * cap * SLOPE)


# Less than a step; a step and no more; a load for each step, the last one short; loads of two steps, as of half a row.
@needs_interpreter
@pytest.mark.parametrize("lines", [1, STEP, 2 * STEP + 5, 65])
def test_several_weighted_targets(capsys, lines):
    """Where two of a token's targets are one, both of its weights count; a token without weights has no gradient."""
    z, _ = inputs(3, lines * THIRDS, jnp.bfloat16)
    targets, weights = several(*z.shape)
    targets = targets.at[1, :2].set(targets[1, 2])
    results = run(z, targets, weights, cap=CAP, shift=50.0)
    check(results, z, targets, weights, 50.0)
    np.testing.assert_array_equal(np.asarray(results[1][-1], np.float32), 0)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.parametrize("cap", [1.0, 23.0, 75.0])
def test_one_target_under_any_cap(cap):
    z, targets = inputs(2, 13 * THIRDS, jnp.bfloat16)
    results = run(z, targets, cap=cap)
    check(results, z, targets, cap=cap)
    for one, other in zip(results, run(z, targets, jnp.ones(targets.shape), cap=cap)):
        np.testing.assert_array_equal(one, other)


@needs_interpreter
def test_a_target_that_is_all_but_certain():
    """The small rest of its share counts: a short float would be wrong by more than that."""
    z, targets = inputs(3, 2 * THIRDS, jnp.bfloat16)
    z = (-200 - jnp.abs(z)).at[jnp.arange(3), targets[:, 0]].set(jnp.asarray([500, 350, 250], z.dtype))
    results = run(z, targets, cap=CAP)
    rest = -expected(z, targets)[1][np.arange(3), targets[:, 0]]
    assert (rest < 1e-5).all()
    check(results, z, targets, others=5e-3)  # float32's rounding of a share, in the rest


@needs_interpreter
def test_logits_at_both_ends_of_the_cap():
    """Sigmoids that are 0 or 1 have no gradient, and no sum is lost."""
    z, targets = inputs(2, THIRDS, jnp.bfloat16)
    z = z.at[:, ::2].set(-jnp.inf).at[:, 1::4].set(3e4)
    logsumexp, dz = run(z, targets, cap=CAP)
    assert np.isfinite(np.asarray(logsumexp)).all()
    ends = np.concatenate([np.asarray(dz, np.float32)[:, ::2], np.asarray(dz, np.float32)[:, 1::4]], axis=1)
    np.testing.assert_array_equal(ends, 0)
    np.testing.assert_allclose(logsumexp, expected(z.at[:, ::2].set(-3e4), targets)[0], rtol=1e-6)


@pytest.mark.parametrize("exponent_bits", [6, 7])
def test_short_floats(exponent_bits):
    short = Short(exponent_bits)
    # From the smallest that has all its bits; float32 is denormal below, and the bits become fewer.
    exponents = np.arange(-124 - short.lift, -1)
    numbers = np.concatenate([[0.0, 0.25], (2.0 ** exponents[:, None] * np.linspace(0.5, 1, 5001)[:-1]).ravel()])
    stored = short.encode(jnp.asarray(numbers * 2.0**short.lift, jnp.float32))
    assert stored.dtype == jnp.bfloat16
    error = np.asarray(short.decode(stored), np.float64) / 2.0**short.lift - numbers
    assert (error[:2] == 0).all()
    worst = np.abs(error[2:] / numbers[2:]).max()
    assert 0.98 * 2.0 ** (exponent_bits - 17) < worst <= 2.0 ** (exponent_bits - 17)


@pytest.mark.parametrize(
    ("logits", "dtype", "fits"),
    [
        (50304, jnp.bfloat16, True),
        (THIRDS, jnp.bfloat16, True),
        (50304, jnp.float32, False),
        (50304 - LINE, jnp.bfloat16, False),
        (50257, jnp.bfloat16, False),
        (144 * THIRDS, jnp.bfloat16, True),
        (145 * THIRDS, jnp.bfloat16, False),  # no room for two rows
    ],
)
def test_what_it_takes(logits, dtype, fits):
    assert hopper_loss.fits(logits, dtype) == fits
    if not fits:
        z, targets = jax.ShapeDtypeStruct((8, logits), dtype), jax.ShapeDtypeStruct((8, 1), jnp.int32)
        with pytest.raises(ValueError, match=f"^no Hopper kernel for rows of {logits} logits in {jnp.dtype(dtype)}"):
            jax.eval_shape(
                lambda z, targets: logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, implementation="hopper"),
                z,
                targets,
            )


def test_refuses_steps_that_leave_warps_without_a_line():
    z, targets = inputs(1, THIRDS, jnp.bfloat16)
    with pytest.raises(ValueError, match="6 lines at a time"):
        hopper_loss.logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, step=6)


@pytest.mark.parametrize(
    ("runs", "dtype", "logits", "options", "taken"),
    [
        (True, jnp.bfloat16, THIRDS, {}, True),
        (False, jnp.bfloat16, THIRDS, {}, False),
        (True, jnp.float32, THIRDS, {}, False),
        (True, jnp.bfloat16, LINE, {}, False),
        (True, jnp.bfloat16, THIRDS, {"interpret": True}, False),
        (True, jnp.bfloat16, THIRDS, {"implementation": "triton"}, False),
    ],
)
def test_auto_takes_it_wherever_it_can(monkeypatch, runs, dtype, logits, options, taken):
    asked = []
    monkeypatch.setattr(hopper_loss, "runs_here", lambda: runs)
    monkeypatch.setattr(hopper_loss, "logsumexp_and_gradient", lambda z, *_, **__: (asked.append(z.shape), z))
    z, targets = inputs(4, logits, dtype)
    choose = logsumexp_and_gradient.__wrapped__  # not compiled: the choice would be kept
    jax.eval_shape(lambda z, targets: choose(z, targets, cap=CAP, slope=SLOPE, **options), z, targets)
    assert asked == ([z.shape] if taken else [])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("lines", [1, STEP, 65, 131])
def test_several_weighted_targets_on_a_gpu(lines):
    """More tokens than two for each multiprocessor: blocks follow one another."""
    z, _ = inputs(600, lines * THIRDS, jnp.bfloat16)
    targets, weights = several(*z.shape)
    options = {"cap": CAP, "slope": SLOPE, "shift": 50.0}
    results = logsumexp_and_gradient(z, targets, weights, implementation="hopper", **options)
    check(results, z, targets, weights, 50.0, **APPROXIMATE)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("step", [4, 8, 12, 16, 20])
@pytest.mark.parametrize("cap", [23.0, 75.0])
def test_steps_on_a_gpu(step, cap):
    z, targets = inputs(300, 50304, jnp.bfloat16)
    results = hopper_loss.logsumexp_and_gradient(z, targets, cap=cap, slope=SLOPE, step=step)
    check(results, z, targets, cap=cap, **APPROXIMATE)


@pytest.mark.gpu
@on_hopper
def test_agrees_with_the_triton_kernel_on_a_gpu():
    z, targets = inputs(512, 50304, jnp.bfloat16)
    (one, d_one), (other, d_other) = (
        logsumexp_and_gradient(z, targets, cap=CAP, slope=SLOPE, implementation=name) for name in ("hopper", "triton")
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(*(np.asarray(dz, np.float32) for dz in (d_one, d_other)), rtol=2**-6, atol=1e-8)


@pytest.mark.gpu
@on_hopper
def test_targets_may_be_a_slice_of_the_tokens_on_a_gpu():
    """One sequence a device: XLA passes a slice as a pointer into the tokens, which need not suit the kernel."""
    z, targets = inputs(300, 128 * THIRDS, jnp.bfloat16)
    tokens = jnp.concatenate([jnp.zeros((1, 1), jnp.int32), targets.T], axis=1)

    def of_tokens(tokens):
        return logsumexp_and_gradient(z, tokens[:, 1:].reshape(-1, 1), implementation="hopper", cap=CAP, slope=SLOPE)

    check(jax.jit(of_tokens)(tokens), z, targets, **APPROXIMATE)
