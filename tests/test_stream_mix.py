"""The first half of a layer with skip connections: on a CPU the fused backward pass runs interpreted, the same code as
on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tiny import random_params, tiny_model

from senano_jax.kernels.triton import RowLaunch
from senano_jax.model.stream_mix import DEFAULT_LAUNCH, MixWeights, backward, stream_mix

NAMES = ("x", "skip", "x0", "weights")


def operands(width, dtype=jnp.float32, *, has_skip=True, length=8):
    """All that stream_mix takes, and gradients of what comes out."""
    keys = iter(jax.random.split(jax.random.key(width), 5))
    x, skip, x0, *gradients = (3 * jax.random.normal(next(keys), (2, length, width), dtype) for _ in range(5))
    weights = MixWeights(jnp.float32(0.9), jnp.float32(0.7) if has_skip else None, jnp.float32(-0.3))
    return (x, skip if has_skip else None, x0, weights), tuple(gradients)


def by_hand(x, skip, x0, weights):
    """In float64."""
    mixed = weights.x * x + weights.x0 * x0 + (0 if skip is None else weights.skip * skip)
    return mixed, mixed / np.sqrt(np.mean(mixed**2, -1, keepdims=True) + 1.1920929e-7)


def gradients_by_hand(x, skip, x0, weights, d_mixed, d_normed):
    """In float64, of x, skip, x0 and the weights."""
    mixed, normed = by_hand(x, skip, x0, weights)
    scale = 1 / np.sqrt(np.mean(mixed**2, -1, keepdims=True) + 1.1920929e-7)
    total = d_mixed + scale * (d_normed - normed * np.mean(normed * d_normed, -1, keepdims=True))
    of_weights = MixWeights(*(None if term is None else np.sum(total * term) for term in (x, skip, x0)))
    d_skip = None if skip is None else weights.skip * total
    return weights.x * total, d_skip, weights.x0 * total, of_weights


def in_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("has_skip", [True, False])
def test_what_comes_out(implementation, has_skip):
    inputs, _ = operands(48, has_skip=has_skip)
    for found, exact in zip(stream_mix(*inputs, implementation), by_hand(*in_float64(inputs)), strict=True):
        np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("width", [32, 96, 768])  # one part, three narrow ones, three wide ones
@pytest.mark.parametrize("has_skip", [True, False])
def test_gradients(implementation, width, has_skip):
    """Of everything that goes in, against float64."""
    inputs, gradients = operands(width, has_skip=has_skip)
    expected = gradients_by_hand(*in_float64(inputs), *in_float64(gradients))
    for launch in (RowLaunch(rows=4, warps=4), DEFAULT_LAUNCH):
        run = functools.partial(stream_mix, implementation=implementation, launch=launch)
        found = jax.vjp(run, *inputs)[1](gradients)
        for name, ours, theirs in zip(NAMES, found, expected, strict=True):
            jax.tree.map(
                lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name),
                ours,
                theirs,
            )


def test_a_float32_stream_gets_a_gradient_that_was_rounded_once():
    """Not a product of rounded numbers rounded again, which errs the same way for all tokens."""
    (x, skip, x0, weights), gradients = operands(96, jnp.bfloat16)
    x = x.astype(jnp.float32) * 1.001
    (mixed, normed), pull_back = jax.vjp(lambda *inputs: stream_mix(*inputs, "fused"), x, skip, x0, weights)
    assert mixed.dtype == normed.dtype == jnp.bfloat16
    d_x, d_skip, d_x0, d_weights = pull_back(gradients)
    assert (d_x.dtype, d_skip.dtype, d_x0.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(d_x, d_x.astype(jnp.bfloat16).astype(jnp.float32))
    # What the kernel reads is the rounded mixture.
    alone = MixWeights(1.0, None, 0.0)
    exact, _, _, along = gradients_by_hand(*in_float64((mixed, None, x0)), alone, *in_float64(gradients))
    half_a_digit = np.exp2(np.floor(np.log2(np.abs(0.9 * exact))) - 8)
    assert np.max(np.abs(d_x - np.float32(0.9) * exact) / half_a_digit) < 1.01
    without = -0.3 * np.sum(exact * in_float64(x0)) + 0.7 * np.sum(exact * in_float64(skip))
    np.testing.assert_allclose(d_weights.x, (along.x - without) / 0.9, rtol=1e-3)
    np.testing.assert_allclose(d_weights.x, np.sum(exact * in_float64(x)), rtol=5e-3)


def test_gradients_of_rematerialised_layers_in_a_loop_over_two_devices():
    """As the model uses it."""
    (x, skip, x0, weights), _ = operands(32)
    skips = jnp.stack([skip, x0, x])

    def loss(x, x0, skips, weights, implementation):
        def layer(x, skip):
            mixed, normed = stream_mix(x, skip, x0, weights, implementation)
            return mixed + 0.5 * normed, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, skips)[0] ** 2)

    def gradients(*rows, weights, implementation):
        of_rows, of_weights = jax.grad(lambda rows, weights: loss(*rows, weights, implementation), argnums=(0, 1))(
            rows, weights
        )
        return of_rows, jax.lax.psum(of_weights, "d")

    rows, stacked, same = PartitionSpec("d"), PartitionSpec(None, "d"), PartitionSpec()
    found, expected = (
        jax.jit(
            jax.shard_map(
                lambda x, x0, skips, weights, name=name: gradients(x, x0, skips, weights=weights, implementation=name),
                mesh=Mesh(np.array(jax.devices()[:2]), "d"),
                in_specs=(rows, rows, stacked, same),
                out_specs=((rows, rows, stacked), same),
                check_vma=False,
            )
        )(x, x0, skips, weights)
        for name in ("fused", "plain")
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_all_of_a_model_with_skip_connections(monkeypatch):
    """Its gradients with the kernel, whose stream's are rounded, against those of plain operations."""
    model = tiny_model()
    params = random_params(model)
    tokens = jnp.arange(2 * 128, dtype=jnp.int32).reshape(2, 128) % 97

    def gradients():
        return jax.jit(jax.grad(lambda params: model.apply({"params": params}, tokens, jnp.roll(tokens, -1, 1), 1)))(
            params
        )

    expected = gradients()
    monkeypatch.setattr("senano_jax.model.stream_mix.takes_fused", lambda *_: True)
    found = gradients()
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 2e-5 * np.linalg.norm(theirs), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("length", "width"), [(8, 24), (3, 32)])  # parts of 8; 6 rows for programs of 4
def test_fused_refuses_what_it_cannot_do(length, width):
    inputs, _ = operands(width, length=length)
    with pytest.raises(ValueError, match=f"no fused kernel for {2 * length} rows of {width}"):
        stream_mix(*inputs, "fused", launch=RowLaunch(rows=4, warps=4))


@pytest.mark.parametrize("has_skip", [True, False])
def test_lowers_for_cuda(has_skip):
    """The kernel passes through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    rows, number = jax.ShapeDtypeStruct((1, 32_768, 768), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    weights = MixWeights(number, number if has_skip else None, number)
    operands = (rows, rows if has_skip else None, rows, weights, rows, rows)
    lowered = backward.trace(*operands, launch=DEFAULT_LAUNCH, interpret=False).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("has_skip", [True, False])
def test_gradients_on_a_gpu(has_skip):
    (x, skip, x0, weights), (d_mixed, d_normed) = operands(768, jnp.bfloat16, has_skip=has_skip, length=4096)
    d_mixed += (x + x0) / 8  # or the sums over all rows, the weights' gradients, are small beside their terms
    inputs, gradients = (x.astype(jnp.float32), skip, x0, weights), (d_mixed, d_normed)

    def pulled_back(implementation, *inputs):
        return jax.vjp(lambda *inputs: stream_mix(*inputs, implementation), *inputs)[1](gradients)

    found, expected = (jax.jit(pulled_back, static_argnums=0)(name, *inputs) for name in ("fused", "plain"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
