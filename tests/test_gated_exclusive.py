"""Exclusive attention and the gate in one pass: on a CPU the kernels run interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from senano_jax.kernels.triton import HeadLaunch, Launches
from senano_jax.model.build import abstract_params
from senano_jax.model.pieces.exclusive import Exclusive
from senano_jax.model.pieces.gated_exclusive import DEFAULT_LAUNCHES, GatedExclusive, gated_exclusive
from senano_jax.model.pieces.head_gate import HeadGate

NAMES = ("y", "v", "share", "gate")


def operands(heads=6, width=32, dtype=jnp.float32, length=32):
    """y, v, share and gate, and a gradient of what comes out."""
    keys = jax.random.split(jax.random.key(heads), 5)
    y, v, gradient = (2 * jax.random.normal(key, (2, length, heads, width), dtype) for key in keys[:3])
    v = v.at[0, 3].set(0).at[1, 5].multiply(1e-6)  # values that count as longer than they are
    v = v.at[1, 7].multiply(1e-4)  # short ones that do not
    share = jnp.tanh(jax.random.normal(keys[3], (heads,)))
    gate = jax.nn.sigmoid(jax.random.normal(keys[4], (2, length, heads)))
    return (y, v, share, gate), gradient


def by_hand(y, v, share, gate):
    """In float64."""
    y, v, share, gate = (np.asarray(a, np.float64) for a in (y, v, share, gate))
    along = (y * v).sum(-1) / np.maximum((v * v).sum(-1), 1e-8)
    return gate[..., None] * (y - (share * along)[..., None] * v)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
def test_what_comes_out(implementation):
    inputs, _ = operands()
    np.testing.assert_allclose(gated_exclusive(*inputs, implementation), by_hand(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "width"), [(6, 32), (4, 16), (1, 128)])
def test_gradients(heads, width):
    inputs, gradient = operands(heads, width)
    _, expected = jax.vjp(lambda *inputs: gated_exclusive(*inputs, "plain"), *inputs)
    small = Launches(HeadLaunch(tokens=4, heads=1, warps=1), HeadLaunch(tokens=2, heads=1, warps=1))
    for launches in (DEFAULT_LAUNCHES, small):
        fused = functools.partial(gated_exclusive, implementation="fused", launches=launches)
        _, found = jax.vjp(fused, *inputs)
        for name, ours, theirs in zip(NAMES, found(gradient), expected(gradient), strict=True):
            # At the shortest values gradients are as large as 1e6.
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)


def test_it_rounds_once():
    """To the nearest bfloat16 of the exact result."""
    inputs, _ = operands(dtype=jnp.bfloat16)
    out, exact = gated_exclusive(*inputs, "fused"), by_hand(*inputs)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_it_is_both_pieces_one_after_the_other():
    """Of a layer, with strengths and gates of its visit."""
    pieces = Exclusive(3, 2), HeadGate(3, 2)
    keys = jax.random.split(jax.random.key(0), 5)
    y, v = (jax.random.normal(key, (1, 16, 2, 16)) for key in keys[:2])
    x = jax.random.normal(keys[2], (1, 16, 32))
    params = {"strength": jax.random.normal(keys[3], (3, 2))}, {"gate": jax.random.normal(keys[4], (3, 2, 12))}
    bound = [piece.bind({"params": own}) for piece, own in zip(pieces, params)]
    one_after_the_other = bound[1].after(bound[0].after(y, v, x, 2), v, x, 2)
    np.testing.assert_allclose(GatedExclusive(*bound).after(y, v, x, 2), one_after_the_other, rtol=1e-5, atol=1e-6)


def test_parameters_keep_their_places():
    params = abstract_params(tiny_model(exclusive_attention=True, head_gate=True))
    attention = params["layer_0"]["attention"]
    assert attention["exclusive"]["strength"].shape == attention["head_gate"]["gate"].shape[:2]


@pytest.mark.parametrize(("length", "width"), [(20, 32), (32, 8), (32, 24)])
def test_fused_refuses_what_it_cannot_do(length, width):
    rows = jnp.ones((1, length, 1, width))
    with pytest.raises(ValueError, match=f"length of {length} and heads of {width}"):
        gated_exclusive(rows, rows, jnp.ones(1), jnp.ones((1, length, 1)), "fused")


def test_lowers_for_cuda():
    """The kernels pass through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    rows = jax.ShapeDtypeStruct((2, 16_384, 6, 128), jnp.bfloat16)
    numbers = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6,), (2, 16_384, 6))]

    @jax.jit
    def value_and_gradients(*operands):
        value, pull_back = jax.vjp(lambda *inputs: gated_exclusive(*inputs, "fused", interpret=False), *operands)
        return value, pull_back(value)

    lowered = value_and_gradients.trace(rows, rows, *numbers).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.gpu
def test_on_a_gpu():
    """In bfloat16 against plain operations in float32, row by row: at the shortest values gradients are so large that
    no other would count beside them."""
    inputs, gradient = operands(6, 128, jnp.bfloat16, length=4096)

    def value_and_gradients(implementation, *inputs):
        value, pull_back = jax.vjp(lambda *inputs: gated_exclusive(*inputs, implementation), *inputs)
        return value, pull_back(gradient.astype(value.dtype))

    found = jax.jit(value_and_gradients, static_argnums=0)("fused", *inputs)
    exact = [a.astype(jnp.float32) for a in inputs]
    expected = jax.jit(value_and_gradients, static_argnums=0)("plain", *exact)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        errors, norms = (np.linalg.norm(a, axis=-1) for a in (ours - theirs, theirs))
        assert np.all(errors <= 2**-8 * norms)
