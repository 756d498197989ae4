"""The Hopper kernels of attention: interpreted, lowered for a GPU, on one, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mosaic_interpreter import interpreted, needs_interpreter
from oracles import softmax_attention, visible_pairs
from test_flash import (
    SCALE,
    random_inputs,
    random_tokens,
    relative_errors,
    value_and_gradients,
    with_another_reader,
)

from senano_jax.attention import attend
from senano_jax.attention.dense import dense_attention
from senano_jax.attention.flash import flash_attention
from senano_jax.attention.hopper_flash import hopper_attention, runs_here
from senano_jax.attention.hopper_tiles import DEFAULT_STAGES, Stages
from senano_jax.attention.intervals import END_OF_TEXT, Intervals, document_start, window_intervals
from senano_jax.errors import UserError

FEW_STAGES = Stages(forward=2, dq=3, dkv=2)
STAGES = {"default stages": DEFAULT_STAGES, "few stages": FEW_STAGES}


def hopper(stages=DEFAULT_STAGES):
    return functools.partial(hopper_attention, stages=stages)


def check_against_dense(stages, tokens, window_blocks, width=64):
    """Values against float64 NumPy too; kept in bfloat16, they differ by its roundings."""
    rng = np.random.default_rng(1)
    inputs = random_inputs(rng, 1, tokens.shape[1], 2, width, jnp.bfloat16)
    intervals = window_intervals(document_start(tokens), window_blocks)
    results = value_and_gradients(hopper(stages), *inputs, intervals)
    assert all(x.dtype == jnp.bfloat16 for x in results)
    exact = [x.astype(jnp.float32) for x in inputs]
    out, *gradients = value_and_gradients(dense_attention, *exact, intervals)
    if np.all(np.asarray(tokens) == END_OF_TEXT):  # the softmax of one score is 1: q and k get no gradient
        assert max(jnp.abs(x).max() for x in results[1:3]) < 0.05
        results, gradients = (results[0], results[3]), gradients[2:]
    oracle = softmax_attention(*[x[0] for x in exact[:3]], visible_pairs(tokens[0], window_blocks), SCALE)
    assert max(relative_errors(results, (oracle[None], *gradients))) < 4e-3
    np.testing.assert_allclose(out[0], oracle, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_agrees_with_dense_and_numpy_without_races(monkeypatch, capsys, stages):
    """Documents that begin within tiles, and a window that begins in the middle of the sequence."""
    tokens = random_tokens(np.random.default_rng(2), 1, 384, 0.01)
    with interpreted(monkeypatch, detect_races=True):
        check_against_dense(stages, tokens, window_blocks=2)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.parametrize(
    ("starts", "window_blocks", "length"),
    [((), 9, 384), ((), 2, 512), ((70, 71, 200, 255, 256), 1, 384), (range(256), 2, 256)],
    ids=["window past the start", "window in the middle", "window of a block", "documents of one token"],
)
def test_agrees_with_dense_and_numpy(monkeypatch, starts, window_blocks, length):
    tokens = jnp.zeros((1, length), jnp.int32).at[0, jnp.array(list(starts), jnp.int32)].set(END_OF_TEXT)
    with interpreted(monkeypatch):
        check_against_dense(FEW_STAGES, tokens, window_blocks)


@needs_interpreter
def test_heads_of_128(monkeypatch):
    with interpreted(monkeypatch):
        check_against_dense(DEFAULT_STAGES, random_tokens(np.random.default_rng(3), 1, 256, 0.01), 2, width=128)


@needs_interpreter
@pytest.mark.parametrize("width", [64, 128])
def test_adds_the_gradient_of_another_reader_of_values_without_races(monkeypatch, capsys, width):
    """All else stays as it is, to the bit."""
    rng = np.random.default_rng(13)
    inputs, (other_dv, *_) = (random_inputs(rng, 1, 256, 2, width, jnp.bfloat16) for _ in range(2))
    intervals = window_intervals(document_start(random_tokens(rng, 1, 256, 0.01)), 2)
    with interpreted(monkeypatch, detect_races=True):
        results = with_another_reader(hopper(), *inputs, other_dv, intervals)
        out, dq, dk, dv = value_and_gradients(hopper(), *inputs, intervals)
    assert "RACE DETECTED" not in capsys.readouterr().out
    for ours, theirs in zip(results[:3], (out, dq, dk)):
        np.testing.assert_array_equal(ours, theirs)
    assert results[3].dtype == jnp.bfloat16
    assert max(relative_errors(results[3:], [dv.astype(jnp.float32) + other_dv.astype(jnp.float32)])) < 4e-3


@needs_interpreter
def test_hidden_keys_get_exactly_nothing(monkeypatch):
    """Of what queries 70..99 output, exactly the keys they see feel a gradient: none before, after, or elsewhere."""
    rng = np.random.default_rng(4)
    tokens = jnp.zeros((1, 256), jnp.int32).at[0, jnp.array([60, 110])].set(END_OF_TEXT)
    q, k, v, dout = random_inputs(rng, 1, 256, 1, 64, jnp.bfloat16)
    dout = dout.at[:, :70].set(0).at[:, 100:].set(0)
    with interpreted(monkeypatch):
        results = value_and_gradients(hopper(), q, k, v, dout, window_intervals(document_start(tokens), 2))
    dq, dk, dv = (np.abs(np.asarray(x, np.float32)).sum((0, 2, 3)) for x in results[1:])
    assert np.flatnonzero(dq).tolist() == list(range(70, 100))
    assert np.flatnonzero(dk).tolist() == list(range(60, 100))
    assert np.flatnonzero(dv).tolist() == list(range(60, 100))


@needs_interpreter
def test_hidden_keys_cannot_be_felt_even_as_infinities_of_scores(monkeypatch):
    """Huge keys of another document and of the future change no bit of an output."""
    rng = np.random.default_rng(5)
    tokens = jnp.zeros((1, 256), jnp.int32).at[0, 60].set(END_OF_TEXT)
    intervals = window_intervals(document_start(tokens), 2)
    q, k, v, _ = random_inputs(rng, 1, 256, 1, 64, jnp.bfloat16)
    with interpreted(monkeypatch):
        # The interpreter's callbacks call JAX themselves: what is begun while they run can stop them for ever.
        out = jax.block_until_ready(hopper_attention(q, k, v, intervals, SCALE))
        k = k.at[:, :60].mul(1e6).at[:, 100:].mul(1e6)
        v = v.at[:, :60].mul(1e6).at[:, 100:].mul(1e6)
        changed = hopper_attention(q, *jax.block_until_ready((k, v)), intervals, SCALE)
    np.testing.assert_array_equal(out[:, 60:100], changed[:, 60:100])


needs_lowering = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or (jax.default_backend() == "gpu" and not runs_here()),
    reason="JAX 0.10 has no stores into accumulators, and lowering is for the GPU that is here, if there is one",
)


def lowered(function, *arguments) -> str:
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@needs_lowering
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("width", [64, 128])
def test_lowers_for_cuda_once_for_all_windows(stages, width):
    """The kernels pass through Pallas into Mosaic GPU's language; no GPU takes part. Shared memory suffices."""
    x = jax.ShapeDtypeStruct((2, 1024, 4, width), jnp.bfloat16)
    starts, window = jax.ShapeDtypeStruct((2, 1024), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def run(q, k, v, dout, starts, window):
        return value_and_gradients(hopper(stages), q, k, v, dout, window_intervals(starts, window))

    assert lowered(jax.jit(run), x, x, x, x, starts, window).count("mosaic_gpu_v2") == 3

    def run_with_values(q, k, v, dout, other_dv, starts, window):
        return with_another_reader(hopper(stages), q, k, v, dout, other_dv, window_intervals(starts, window))

    assert lowered(jax.jit(run_with_values), x, x, x, x, x, starts, window).count("mosaic_gpu_v2") == 3


def loss_of_layers(attention, x, key_start, query_end):
    """As the model uses it: layers scanned and rematerialised."""
    layer = jax.checkpoint(
        lambda x: attention(x, x, x, Intervals(key_start, query_end), SCALE),
        policy=jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    )
    x, _ = jax.lax.scan(lambda x, _: (x + layer(x), None), x, length=2)
    return jnp.sum(x.astype(jnp.float32) ** 2)


def sharded_gradient(attention):
    mesh, rows = Mesh(np.array(jax.devices()[:2]), "d"), PartitionSpec("d")
    gradient = jax.grad(functools.partial(loss_of_layers, attention))
    return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))


@needs_lowering
def test_lowers_inside_scan_remat_and_shard_map():
    """Three kernels: what is named is kept, so the backward pass does not run the forward kernel again."""
    x, bounds = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4, 256), jnp.int32)
    assert lowered(sharded_gradient(hopper_attention), x, bounds, bounds).count("mosaic_gpu_v2") == 3


@pytest.mark.parametrize(
    ("length", "heads", "width", "dtype", "scale", "match"),
    [
        (100, 1, 64, jnp.bfloat16, 0.1, "multiple of 128"),
        (128, 1, 32, jnp.bfloat16, 0.1, "64 or 128 wide"),
        (128, 1, 256, jnp.bfloat16, 0.1, "64 or 128 wide"),
        (128, 1, 64, jnp.float32, 0.1, "bfloat16"),
        (128, 1, 64, jnp.bfloat16, -1.0, "positive"),
    ],
)
def test_refuses_what_it_cannot_do(length, heads, width, dtype, scale, match):
    q, k, v, _ = random_inputs(np.random.default_rng(7), 1, length, heads, width, dtype)
    bounds = jnp.zeros((1, length), jnp.int32)
    with pytest.raises(ValueError, match=match):
        hopper_attention(q, k, v, Intervals(bounds, bounds), scale)


@needs_interpreter
def test_fewer_tiles_than_stages_in_two_sequences(monkeypatch):
    """Of three heads; each program has two tiles."""
    inputs = random_inputs(np.random.default_rng(8), 2, 128, 3, 64, jnp.bfloat16)
    intervals = window_intervals(jnp.zeros((2, 128), jnp.int32), 1)
    with interpreted(monkeypatch):
        results = value_and_gradients(hopper(), *inputs, intervals)
    references = value_and_gradients(dense_attention, *[x.astype(jnp.float32) for x in inputs], intervals)
    assert max(relative_errors(results, references)) < 4e-3


@pytest.mark.parametrize(
    ("implementation", "here", "on_gpu", "width", "dtype", "taken"),
    [
        ("auto", True, True, 64, jnp.bfloat16, "hopper"),
        ("auto", True, True, 32, jnp.bfloat16, "flash"),
        ("auto", True, True, 64, jnp.float32, "flash"),
        ("auto", False, True, 64, jnp.bfloat16, "flash"),
        ("auto", False, True, 24, jnp.bfloat16, "banded"),
        ("auto", False, False, 64, jnp.bfloat16, "banded"),
        ("flash", True, True, 64, jnp.bfloat16, "flash"),
        ("hopper", True, True, 64, jnp.bfloat16, "hopper"),
    ],
)
def test_attend_takes_the_fastest_that_runs_unless_told(monkeypatch, implementation, here, on_gpu, width, dtype, taken):
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: here)
    monkeypatch.setattr("senano_jax.attention.on_gpu", lambda: on_gpu)
    monkeypatch.setattr("senano_jax.attention.hopper_flash.hopper_attention", lambda *_: "hopper")
    monkeypatch.setattr("senano_jax.attention.flash_attention", lambda *_: "flash")
    monkeypatch.setattr("senano_jax.attention.banded_attention", lambda *_: "banded")
    x = jnp.zeros((1, 128, 1, width), dtype)
    intervals = window_intervals(jnp.zeros((1, 128), jnp.int32), 1)
    assert attend(x, x, x, intervals, SCALE, implementation) == taken


@pytest.mark.parametrize(
    ("here", "width", "dtype", "match"),
    [
        (False, 64, jnp.bfloat16, "needs a Hopper GPU"),
        (True, 32, jnp.bfloat16, "64 or 128 wide, not bfloat16 of 32"),
        (True, 64, jnp.float32, "not float32 of 64"),
    ],
)
def test_attend_says_what_it_lacks(monkeypatch, here, width, dtype, match):
    q, k, v, _ = random_inputs(np.random.default_rng(8), 1, 128, 1, width, dtype)
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: here)
    with pytest.raises(UserError, match=match):
        attend(q, k, v, window_intervals(jnp.zeros((1, 128), jnp.int32), 1), SCALE, "hopper")


on_hopper = pytest.mark.skipif(not runs_here(), reason="needs a Hopper GPU")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("width", [64, 128])
def test_agrees_with_dense_on_gpu(width, stages):
    rng = np.random.default_rng(9)
    inputs = random_inputs(rng, 1, 4096, 2, width, jnp.bfloat16)
    starts = document_start(random_tokens(rng, 1, 4096, 0.002))
    run = jax.jit(functools.partial(value_and_gradients, hopper(stages)))
    with jax.default_matmul_precision("highest"):
        dense = jax.jit(functools.partial(value_and_gradients, dense_attention))
        for window_blocks in (1, 2, 3, 7, 14, 32):
            intervals = window_intervals(starts, window_blocks)
            references = dense(*[x.astype(jnp.float32) for x in inputs], intervals)
            errors = relative_errors(run(*inputs, intervals), references)
            assert max(errors) < 1e-2, (window_blocks, errors)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", [16384, 24576])
def test_agrees_with_flash_at_the_record_s_sizes(length):
    rng = np.random.default_rng(10)
    inputs = random_inputs(rng, 2, length, 6, 128, jnp.bfloat16)
    starts = document_start(random_tokens(rng, 2, length, 1 / 720))
    flash, run = (jax.jit(functools.partial(value_and_gradients, f)) for f in (flash_attention, hopper_attention))
    for window_blocks in (1, 7, 14, 200):
        intervals = window_intervals(starts, window_blocks)
        errors = relative_errors(run(*inputs, intervals), flash(*inputs, intervals))
        assert max(errors) < 1e-2, (window_blocks, errors)


@pytest.mark.gpu
@on_hopper
def test_inside_scan_remat_and_shard_map_on_gpu():
    x, *_ = random_inputs(np.random.default_rng(12), 4, 512, 2, 64, jnp.bfloat16)
    intervals = window_intervals(document_start(random_tokens(np.random.default_rng(12), 4, 512, 0.01)), 2)
    results = [sharded_gradient(attention)(x, *intervals) for attention in (hopper_attention, flash_attention)]
    assert relative_errors(results[:1], results[1:])[0] < 1e-2


@pytest.mark.gpu
@on_hopper
def test_adds_the_gradient_of_another_reader_of_values_on_gpu():
    rng = np.random.default_rng(14)
    inputs, (other_dv, *_) = (random_inputs(rng, 2, 4096, 2, 128, jnp.bfloat16) for _ in range(2))
    intervals = window_intervals(document_start(random_tokens(rng, 2, 4096, 0.002)), 7)
    results = jax.jit(functools.partial(with_another_reader, hopper()))(*inputs, other_dv, intervals)
    out, dq, dk, dv = jax.jit(functools.partial(value_and_gradients, hopper()))(*inputs, intervals)
    for ours, theirs in zip(results[:3], (out, dq, dk)):
        np.testing.assert_array_equal(ours, theirs)
    assert max(relative_errors(results[3:], [dv.astype(jnp.float32) + other_dv.astype(jnp.float32)])) < 5e-3


@pytest.mark.gpu
@on_hopper
def test_same_bits_every_time_on_gpu():
    rng = np.random.default_rng(11)
    inputs = random_inputs(rng, 2, 4096, 2, 128, jnp.bfloat16)
    intervals = window_intervals(document_start(random_tokens(rng, 2, 4096, 0.002)), 7)
    run = jax.jit(functools.partial(value_and_gradients, hopper_attention))
    first = run(*inputs, intervals)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, run(*inputs, intervals), first)
