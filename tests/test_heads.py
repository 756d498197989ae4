"""Queries, keys and values from the product: on a CPU the fused kernels run interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import norm, rotary

from senano_jax.kernels.triton import HeadLaunch, Launches
from senano_jax.model import heads_kernels
from senano_jax.model.elementwise import NORM_EPSILON
from senano_jax.model.heads import prepare_heads
from senano_jax.model.pieces.key_offset import offset_keys
from senano_jax.model.rotary import rotary_tables

# Different shapes of program for the two directions, both smaller than the default's.
SMALL = Launches(forward=HeadLaunch(tokens=8, heads=2, warps=4), backward=HeadLaunch(tokens=32, heads=3, warps=4))
NAMES = ("q", "k", "v", "dqkv", "dfirst_v", "dvalue_residual")


def random_inputs(seed, batch, length, heads, width, mixed=True, dtype=jnp.float32):
    """qkv, first_v or None, value_residual, and cotangents of q, k and v."""
    rng = np.random.default_rng(seed)
    qkv = jnp.asarray(rng.standard_normal((batch, length, 3 * heads * width)), dtype)
    first_v, *gradients = (jnp.asarray(rng.standard_normal((batch, length, heads, width)), dtype) for _ in range(4))
    return qkv, first_v if mixed else None, jnp.float32(0.3), tuple(gradients)


@functools.partial(jax.jit, static_argnames=("implementation", "launches", "interpret", "offsets_keys"))
def value_and_gradients(qkv, first_v, value_residual, gradients, implementation, **options):
    """By name: q, k, v and the gradients of qkv, of value_residual and, if there is one, of first_v."""
    _, length, heads, width = gradients[0].shape
    prepare = functools.partial(
        prepare_heads,
        rotary=rotary_tables(length, width),
        num_heads=heads,
        implementation=implementation,
        **options,
    )
    out, pullback = jax.vjp(prepare, qkv, first_v, value_residual)
    return {name: x for name, x in zip(NAMES, (*out, *pullback(gradients))) if x is not None}


def relative_errors(results, references):
    """Of each result in the Frobenius norm; where the reference is 0, the norm itself."""
    assert results.keys() == references.keys()
    errors = {}
    for name, reference in references.items():
        x, y = np.asarray(results[name], np.float64), np.asarray(reference, np.float64)
        assert x.shape == y.shape
        errors[name] = np.linalg.norm(x - y) / (np.linalg.norm(y) or 1)
    return errors


def test_the_formula():
    """Plain against float64 NumPy."""
    qkv, first_v, value_residual, _ = random_inputs(0, 1, 64, 2, 32)
    q, k, v = prepare_heads(qkv, first_v, value_residual, rotary_tables(64, 32), 2, "plain")
    own_q, own_k, own_v = np.asarray(qkv[0], np.float64).reshape(64, 3, 2, 32).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(q[0], rotary(norm(own_q)), atol=2e-5)
    np.testing.assert_allclose(k[0], rotary(norm(own_k)), atol=2e-5)
    np.testing.assert_allclose(v[0], 0.7 * own_v + 0.3 * np.asarray(first_v[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "mixed", "options"),
    [
        (2, 64, 6, 16, True, {"launches": SMALL}),
        (1, 32, 6, 128, True, {}),
        (2, 32, 2, 32, False, {}),
        (1, 64, 1, 64, True, {"launches": SMALL}),
    ],
)
def test_fused_is_plain(batch, length, heads, width, mixed, options):
    inputs = random_inputs(1, batch, length, heads, width, mixed)
    results = value_and_gradients(*inputs, "fused", **options)
    errors = relative_errors(results, value_and_gradients(*inputs, "plain"))
    assert errors.pop("dvalue_residual", 0) < 1e-5  # a sum whose terms cancel
    assert max(errors.values()) < 1e-6, errors
    assert set(NAMES) - results.keys() == (set() if mixed else {"dfirst_v"})


@pytest.mark.parametrize("options", [{}, {"launches": SMALL}])
@pytest.mark.parametrize("mixed", [True, False])
def test_fused_keys_with_dimensions_of_the_key_before(mixed, options):
    """Over the borders of programs, at both ends of two sequences."""
    inputs = random_inputs(8, 2, 64, 6, 32, mixed)
    results = value_and_gradients(*inputs, "fused", offsets_keys=True, **options)
    references = value_and_gradients(*inputs, "plain", offsets_keys=True)
    errors = relative_errors(results, references)
    assert errors.pop("dvalue_residual", 0) < 1e-5
    assert max(errors.values()) < 1e-6, errors
    without = relative_errors(value_and_gradients(*inputs, "plain"), references)
    assert min(without["k"], without["dqkv"]) > 0.1


@pytest.mark.parametrize("launch", [heads_kernels.DEFAULT_LAUNCHES.forward, SMALL.forward], ids=["default", "small"])
@pytest.mark.parametrize("width", [32, 128])
def test_the_offset_by_itself_has_the_same_bits(width, launch):
    k = jnp.asarray(np.random.default_rng(10).standard_normal((2, 64, 6, width)), jnp.bfloat16)
    np.testing.assert_array_equal(heads_kernels.offset_keys(k, launch, True), offset_keys(k))


def test_the_gradient_of_the_offset_by_itself():
    """Into memory whose other parts stay, from keys before the offset and their scale in place of the product."""
    qkv, _, _, (_, dk, _) = random_inputs(9, 2, 32, 6, 32)
    tables, launch = rotary_tables(32, 32), SMALL.forward
    _, k, _ = heads_kernels.forward(qkv, None, None, tables, 6, False, launch, True)
    own_k = qkv.reshape(2, 32, 3, 6, 32)[:, :, 1]
    k_scale = jax.lax.rsqrt(jnp.mean(own_k**2, axis=-1) + NORM_EPSILON).swapaxes(1, 2)
    others = jnp.full((2, 32, 18, 32), 7, qkv.dtype)
    d_product = heads_kernels.backward_of_offset_keys(others, k, k_scale, tables, dk, launch, True)
    expected, _ = heads_kernels.backward(qkv, None, None, tables, dk, dk, dk, 6, True, launch, True)
    d_q, d_k, d_v = jnp.split(d_product, 3, axis=2)
    assert jnp.all(d_q == 7) and jnp.all(d_v == 7)
    np.testing.assert_allclose(d_k, expected.reshape(others.shape)[:, :, 6:12], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """Nearer to float32 than `plain`: the errors are those of one rounding, 2^-9 at most and less on average."""
    inputs = random_inputs(2, 1, 32, 2, 128, dtype=jnp.bfloat16)
    exact = value_and_gradients(*jax.tree.map(lambda x: x.astype(jnp.float32), inputs), "plain")
    fused, plain = (value_and_gradients(*inputs, implementation) for implementation in ("fused", "plain"))
    for name, x in fused.items():
        assert x.dtype == (jnp.float32 if name == "dvalue_residual" else jnp.bfloat16)
    fused_errors, plain_errors = relative_errors(fused, exact), relative_errors(plain, exact)
    assert max(fused_errors.values()) < 2**-9, fused_errors
    assert fused_errors["dvalue_residual"] < 1e-5
    for name in ("q", "k", "dqkv"):
        assert fused_errors[name] < plain_errors[name]


def test_gradient_of_a_tiny_vector():
    """Where the epsilon counts, and of a zero vector, for which it is all there is."""
    qkv, first_v, value_residual, gradients = random_inputs(3, 1, 16, 1, 16)
    qkv = qkv.at[:, 0].set(0).at[:, 1].mul(1e-4)
    results = value_and_gradients(qkv, first_v, value_residual, gradients, "fused")
    errors = relative_errors(results, value_and_gradients(qkv, first_v, value_residual, gradients, "plain"))
    assert max(errors.values()) < 1e-5, errors


def test_first_values_collect_gradients_from_all_layers():
    """As the model uses it: rematerialised layers in a scan take the first one's values."""
    qkv, _, _, _ = random_inputs(4, 2, 32, 2, 32)
    tables = rotary_tables(32, 32)

    def loss(qkv, weights, implementation):
        prepare = functools.partial(prepare_heads, rotary=tables, num_heads=2, implementation=implementation)
        layer = jax.checkpoint(lambda x, first_v, w: prepare(x, first_v, w))
        *_, first_v = prepare(qkv, None, weights[0])

        def body(x, w):
            q, k, v = layer(x, first_v, w)
            return x + jnp.concatenate([q * v, k + v, v * k], axis=2).reshape(x.shape), None

        return jnp.sum(jax.lax.scan(body, qkv, weights)[0] ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    weights = jnp.array([0.3, 0.6, -0.2])
    results, references = (
        dict(zip(("dqkv", "dweights"), gradient(qkv, weights, implementation))) for implementation in ("fused", "plain")
    )
    assert max(relative_errors(results, references).values()) < 1e-5


def test_auto_takes_plain_without_a_gpu_or_without_a_kernel(monkeypatch):
    qkv, first_v, value_residual, _ = random_inputs(5, 1, 32, 1, 24)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        jaxpr = jax.make_jaxpr(prepare_heads, static_argnums=4)(qkv, first_v, value_residual, rotary_tables(32, 24), 1)
        assert "pallas_call" not in str(jaxpr)
    wide = jax.make_jaxpr(prepare_heads, static_argnums=4)(
        *random_inputs(5, 1, 32, 1, 32)[:3], rotary_tables(32, 32), 1
    )
    assert "pallas_call" in str(wide)


@pytest.mark.parametrize(("length", "width"), [(20, 32), (32, 8), (32, 24)])
def test_fused_refuses_what_it_cannot_do(length, width):
    qkv, first_v, value_residual, _ = random_inputs(6, 1, length, 1, width)
    with pytest.raises(ValueError, match=f"length of {length} and heads of {width}"):
        prepare_heads(qkv, first_v, value_residual, rotary_tables(length, width), 1, "fused")


@pytest.mark.parametrize("offsets_keys", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 24_576, 6), (2, 24_576, 6), (1, 131_072, 6), (1, 1024, 1)])
def test_lowers_for_cuda(batch, length, heads, mixed, offsets_keys):
    """The kernels pass through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    qkv = jax.ShapeDtypeStruct((batch, length, 3 * heads * 128), jnp.bfloat16)
    part = jax.ShapeDtypeStruct((batch, length, heads, 128), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    inputs = qkv, part if mixed else None, weight, (part,) * 3
    traced = value_and_gradients.trace(*inputs, "fused", interpret=False, offsets_keys=offsets_keys)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize(("batch", "length", "heads"), [(2, 24_576, 6), (1, 1024, 1)])
def test_the_offset_by_itself_lowers_for_cuda(batch, length, heads):
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    launches = heads_kernels.DEFAULT_LAUNCHES

    def run(k, k_scale, d_product, dk):
        tables, last = rotary_tables(length, 128), (launches.backward, False)
        d_product = heads_kernels.backward_of_offset_keys(d_product, k, k_scale, tables, dk, *last)
        return heads_kernels.offset_keys(k, launches.forward, False), d_product

    k = jax.ShapeDtypeStruct((batch, length, heads, 128), jnp.bfloat16)
    k_scale = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    d_product = jax.ShapeDtypeStruct((batch, length, 3 * heads, 128), jnp.bfloat16)
    text = jax.jit(run).trace(k, k_scale, d_product, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2 and text.count("output_operand_alias<") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("offsets_keys", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("heads", "width"), [(6, 128), (1, 16)])
def test_on_gpu(heads, width, mixed, offsets_keys):
    """In bfloat16 against plain float32, and the same bits every time."""
    inputs = random_inputs(7, 2, 4096, heads, width, mixed, jnp.bfloat16)
    exact = value_and_gradients(
        *jax.tree.map(lambda x: x.astype(jnp.float32), inputs), "plain", offsets_keys=offsets_keys
    )
    results = value_and_gradients(*inputs, "auto", offsets_keys=offsets_keys)
    errors = relative_errors(results, exact)
    assert max(errors.values()) < 2**-9, errors
    assert errors["dvalue_residual"] < 1e-3
    for _ in range(3):
        again = value_and_gradients(*inputs, "fused", offsets_keys=offsets_keys)
        jax.tree.map(np.testing.assert_array_equal, again, results)
