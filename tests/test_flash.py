"""Flash attention against the dense one: on a CPU the kernels run interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from senano_jax.attention.dense import dense_attention
from senano_jax.attention.flash import flash_attention
from senano_jax.attention.intervals import END_OF_TEXT, Intervals, document_start, window_intervals
from senano_jax.attention.tiles import Tile, Tiles

SCALE = 0.12
# Unequal sides in both directions: borders fall inside tiles, and a range of tiles has all three parts.
SMALL_TILES = Tiles(forward=Tile(64, 32, 4, 1), dq=Tile(32, 64, 4, 1), dkv=Tile(32, 64, 4, 1))


def random_tokens(rng: np.random.Generator, batch: int, length: int, documents: float) -> jax.Array:
    """int32 [batch, length] in which about `documents` of the tokens start a document."""
    return jnp.asarray(np.where(rng.random((batch, length)) < documents, END_OF_TEXT, 0), jnp.int32)


def random_inputs(rng, batch, length, heads, width, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    shape = (batch, length, heads, width)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]


def value_and_gradients(attention, q, k, v, dout, intervals):
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, intervals, SCALE), q, k, v)
    return out, *pullback(dout)


def with_another_reader(attention, q, k, v, dout, other_dv, intervals):
    """The same where something else reads the values that attention gives out again, and gives them a gradient."""
    (out, same), pullback = jax.vjp(lambda q, k, v: attention(q, k, v, intervals, SCALE, with_values=True), q, k, v)
    assert same.shape == v.shape
    return out, *pullback((dout, other_dv))


def relative_errors(results, references):
    """Of out, dq, dk and dv, in the Frobenius norm."""
    results, references = ([np.asarray(x, np.float64) for x in xs] for xs in (results, references))
    return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(results, references)]


@pytest.mark.parametrize(
    ("documents", "window_blocks", "width"),
    [(0.0, 2, 64), (0.02, 1, 64), (0.02, 3, 128), (0.005, 9, 64), (1.0, 2, 64)],
    ids=["one document", "window of a block", "both cut", "window past the start", "documents of one token"],
)
def test_agrees_with_dense(documents, window_blocks, width):
    rng = np.random.default_rng(1)
    q, k, v, dout = random_inputs(rng, 2, 384, 2, width)
    intervals = window_intervals(document_start(random_tokens(rng, 2, 384, documents)), window_blocks)
    flash = jax.jit(functools.partial(value_and_gradients, functools.partial(flash_attention, tiles=SMALL_TILES)))
    results = flash(q, k, v, dout, intervals)
    references = value_and_gradients(dense_attention, q, k, v, dout, intervals)
    if documents == 1.0:  # the softmax of one score is 1: q and k get no gradient but for rounding
        assert max(jnp.abs(x).max() for x in (*results[1:3], *references[1:3])) < 1e-5
        results, references = results[::3], references[::3]
    assert max(relative_errors(results, references)) < 1e-5


def test_adds_the_gradient_of_another_reader_of_values():
    rng = np.random.default_rng(13)
    (q, k, v, dout), (other_dv, *_) = (random_inputs(rng, 2, 384, 2, 64) for _ in range(2))
    intervals = window_intervals(document_start(random_tokens(rng, 2, 384, 0.02)), 1)
    out, dq, dk, dv = value_and_gradients(dense_attention, q, k, v, dout, intervals)
    flash = functools.partial(flash_attention, tiles=SMALL_TILES)
    results = with_another_reader(flash, q, k, v, dout, other_dv, intervals)
    assert max(relative_errors(results, (out, dq, dk, dv + other_dv))) < 1e-5


def test_another_reader_s_gradient_is_rounded_once():
    """bfloat16: with that of attention, which is not rounded before. In documents of two tokens and with keys of 0 the
    weights are 1, 1/2 and 1/2, so that the sums are known."""
    q, k, v, dout = random_inputs(np.random.default_rng(14), 1, 256, 1, 64, jnp.bfloat16)
    tokens = jnp.where(jnp.arange(256) % 2 == 0, END_OF_TEXT, 0)[None]
    own_dv = dout.astype(jnp.float32).at[:, ::2].add(0.5 * dout[:, 1::2].astype(jnp.float32))
    own_dv = own_dv.at[:, 1::2].mul(0.5)
    other_dv = (-own_dv).astype(jnp.bfloat16) + v / 64  # the sum is small beside its terms
    inputs = q, 0 * k, v, dout, other_dv, window_intervals(document_start(tokens), 1)
    *_, dv = with_another_reader(flash_attention, *inputs)
    exact = own_dv + other_dv.astype(jnp.float32)
    np.testing.assert_allclose(dv.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_a_loop_keeps_values_with_another_reader_once(capsys):
    """Of each layer q, k, v and out."""
    x, *_ = random_inputs(np.random.default_rng(15), 1, 128, 1, 64)
    intervals = window_intervals(jnp.zeros((1, 128), jnp.int32), 1)

    def loss(x):
        def layer(x, _):
            out, v = flash_attention(2 * x, 3 * x, 4 * x, intervals, SCALE, with_values=True)
            return x + out * v, None

        return jnp.sum(jax.lax.scan(layer, x, length=3)[0])

    jax.ad_checkpoint.print_saved_residuals(loss, x)
    assert capsys.readouterr().out.count("f32[3,1,128,1,64]") == 4


@pytest.mark.parametrize("length", [128, 384])
def test_default_tiles_and_bfloat16(length):
    rng = np.random.default_rng(2)
    q, k, v, dout = random_inputs(rng, 1, length, 2, 128, jnp.bfloat16)
    intervals = window_intervals(document_start(random_tokens(rng, 1, length, 0.01)), 2)
    flash = jax.jit(functools.partial(value_and_gradients, flash_attention))
    results = flash(q, k, v, dout, intervals)
    assert all(x.dtype == jnp.bfloat16 for x in results)
    exact = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    assert max(relative_errors(results, value_and_gradients(dense_attention, *exact, intervals))) < 1e-2


def test_hidden_keys_get_exactly_nothing():
    """Of what queries 70..99 output, exactly the keys they see feel a gradient: none before, after, or elsewhere."""
    rng = np.random.default_rng(3)
    tokens = jnp.zeros((1, 256), jnp.int32).at[0, jnp.array([60, 110])].set(END_OF_TEXT)
    intervals = window_intervals(document_start(tokens), 2)
    q, k, v, dout = random_inputs(rng, 1, 256, 1, 64)
    dout = dout.at[:, :70].set(0).at[:, 100:].set(0)
    flash = functools.partial(flash_attention, tiles=SMALL_TILES)
    results = jax.jit(functools.partial(value_and_gradients, flash))(q, k, v, dout, intervals)
    dq, dk, dv = (np.abs(np.asarray(x)).sum((0, 2, 3)) for x in results[1:])
    assert np.flatnonzero(dq).tolist() == list(range(70, 100))
    assert np.flatnonzero(dk).tolist() == list(range(60, 100))
    assert np.flatnonzero(dv).tolist() == list(range(60, 100))


def test_hidden_keys_cannot_be_felt_even_as_infinities_of_scores():
    """Huge keys of another document and of the future change no bit of an output."""
    rng = np.random.default_rng(4)
    tokens = jnp.zeros((1, 256), jnp.int32).at[0, 60].set(END_OF_TEXT)
    intervals = window_intervals(document_start(tokens), 2)
    q, k, v, _ = random_inputs(rng, 1, 256, 1, 64)
    out = flash_attention(q, k, v, intervals, SCALE, tiles=SMALL_TILES)
    k = k.at[:, :60].mul(1e6).at[:, 100:].mul(1e6)
    v = v.at[:, :60].mul(1e6).at[:, 100:].mul(1e6)
    changed = flash_attention(q, k, v, intervals, SCALE, tiles=SMALL_TILES)
    np.testing.assert_array_equal(out[:, 60:100], changed[:, 60:100])


def test_one_compilation_for_all_windows():
    rng = np.random.default_rng(5)
    q, k, v, dout = random_inputs(rng, 1, 256, 1, 64)
    starts = document_start(random_tokens(rng, 1, 256, 0.01))
    traces = 0

    @jax.jit
    def flash(window_blocks):
        nonlocal traces
        traces += 1
        return value_and_gradients(flash_attention, q, k, v, dout, window_intervals(starts, window_blocks))

    results = [flash(jnp.int32(window)) for window in (1, 2, 5)]
    assert traces == 1
    reference = value_and_gradients(dense_attention, q, k, v, dout, window_intervals(starts, 1))
    assert max(relative_errors(results[0], reference)) < 1e-5
    assert not np.array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[1][0], results[2][0])  # two blocks are all there are


def test_inside_scan_remat_and_shard_map():
    """As the model uses it: layers scanned and rematerialised, each device with its own sequences."""
    rng = np.random.default_rng(6)
    x, *_ = random_inputs(rng, 2, 128, 1, 64)
    intervals = window_intervals(document_start(random_tokens(rng, 2, 128, 0.02)), 1)

    def loss(attention, x, key_start, query_end):
        layer = jax.checkpoint(
            lambda x: attention(x, x, x, Intervals(key_start, query_end), SCALE),
            policy=jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
        )
        x, _ = jax.lax.scan(lambda x, _: (x + layer(x), None), x, length=2)
        return jnp.sum(x**2)

    gradient = jax.grad(functools.partial(loss, flash_attention))
    mesh = Mesh(np.array(jax.devices()[:2]) if jax.device_count() > 1 else np.array(jax.devices()), "d")
    rows = PartitionSpec("d")
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    reference = jax.grad(functools.partial(loss, dense_attention))(x, *intervals)
    assert relative_errors([sharded(x, *intervals)], [reference])[0] < 1e-5


def test_remat_policy_keeps_the_named_residuals(capsys):
    rng = np.random.default_rng(7)
    q, k, v, _ = random_inputs(rng, 1, 128, 1, 64)
    intervals = window_intervals(document_start(random_tokens(rng, 1, 128, 0.0)), 1)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    layer = jax.checkpoint(lambda q, k, v: flash_attention(q, k, v, intervals, SCALE), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(layer, q, k, v)
    saved = capsys.readouterr().out
    assert "named 'attention_out'" in saved
    assert "named 'attention_lse'" in saved


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_lowers_for_cuda(dtype, width):
    """The kernels pass through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    x = jax.ShapeDtypeStruct((2, 1024, 3, width), dtype)
    bounds = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    flash = functools.partial(value_and_gradients, functools.partial(flash_attention, interpret=False))
    lowered = jax.jit(flash).trace(x, x, x, x, Intervals(bounds, bounds)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3
    flash = functools.partial(with_another_reader, functools.partial(flash_attention, interpret=False))
    lowered = jax.jit(flash).trace(x, x, x, x, x, Intervals(bounds, bounds)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    ("length", "width", "scale", "match"),
    [(100, 64, 0.1, "multiple of 128"), (128, 48, 0.1, "power of two"), (128, 64, -1.0, "positive")],
)
def test_refuses_what_it_cannot_do(length, width, scale, match):
    q, k, v, _ = random_inputs(np.random.default_rng(8), 1, length, 1, width)
    bounds = jnp.zeros((1, length), jnp.int32)
    with pytest.raises(ValueError, match=match):
        flash_attention(q, k, v, Intervals(bounds, bounds), scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 1e-2), (jnp.float32, 1e-4)])
@pytest.mark.parametrize("width", [64, 128])
def test_on_gpu(dtype, bound, width):
    rng = np.random.default_rng(9)
    inputs = random_inputs(rng, 1, 4096, 2, width, dtype)
    starts = document_start(random_tokens(rng, 1, 4096, 0.002))
    flash = jax.jit(functools.partial(value_and_gradients, flash_attention))
    with jax.default_matmul_precision("highest"):
        dense = jax.jit(functools.partial(value_and_gradients, dense_attention))
        for window_blocks in (1, 2, 3, 5, 7, 14):
            intervals = window_intervals(starts, window_blocks)
            references = dense(*[x.astype(jnp.float32) for x in inputs], intervals)
            errors = relative_errors(flash(*inputs, intervals), references)
            assert max(errors) < bound, (window_blocks, errors)


@pytest.mark.gpu
def test_adds_the_gradient_of_another_reader_of_values_on_gpu():
    rng = np.random.default_rng(16)
    inputs, (other_dv, *_) = (random_inputs(rng, 1, 4096, 2, 128, jnp.bfloat16) for _ in range(2))
    intervals = window_intervals(document_start(random_tokens(rng, 1, 4096, 0.002)), 7)
    results = jax.jit(functools.partial(with_another_reader, flash_attention))(*inputs, other_dv, intervals)
    out, dq, dk, dv = jax.jit(functools.partial(value_and_gradients, flash_attention))(*inputs, intervals)
    for ours, theirs in zip(results[:3], (out, dq, dk)):
        np.testing.assert_array_equal(ours, theirs)
    assert max(relative_errors(results[3:], [dv.astype(jnp.float32) + other_dv.astype(jnp.float32)])) < 5e-3


@pytest.mark.gpu
def test_on_gpu_same_bits_every_time():
    rng = np.random.default_rng(10)
    inputs = random_inputs(rng, 2, 4096, 2, 128, jnp.bfloat16)
    intervals = window_intervals(document_start(random_tokens(rng, 2, 4096, 0.002)), 7)
    flash = jax.jit(functools.partial(value_and_gradients, flash_attention))
    first = flash(*inputs, intervals)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, flash(*inputs, intervals), first)
