"""Attention of a product, whose gradient goes back to the product inside attention's own kernels for Hopper GPUs:
interpreted, lowered for a GPU, and on one."""

import dataclasses
import functools
import re

import attention_alone
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mosaic_interpreter import interpreted, needs_interpreter
from test_flash import SCALE, random_tokens
from test_heads import relative_errors
from test_hopper_flash import lowered, needs_lowering, on_hopper
from tiny import tiny_model

from senano_jax.attention import END_OF_TEXT, Intervals, document_start, window_intervals
from senano_jax.attention.hopper_flash import hopper_attention
from senano_jax.model import heads_attention
from senano_jax.model.heads import prepare_heads
from senano_jax.model.heads_attention import attend_heads
from senano_jax.model.rotary import rotary_tables

NAMES = ("out", "v", "d_qkv", "d_first_v", "d_value_residual")


def random_inputs(seed, batch, length, heads, width, *, mixed=True, read_again=True):
    """qkv, first_v or None, value_residual, and the gradients of the output and of the values, None if nothing else
    reads these. first_v is so much like the first gradient that the sum over both, value_residual's, does not vanish.
    """
    rng = np.random.default_rng(seed)
    of_heads = (batch, length, heads, width)
    qkv, first_v, dout, other_dv = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((batch, length, 3 * heads * width), of_heads, of_heads, of_heads)
    )
    first_v = (first_v + dout) / 2
    return qkv, first_v if mixed else None, jnp.float32(0.3), dout, other_dv if read_again else None


def random_intervals(seed, batch, length, documents, window_blocks):
    tokens = random_tokens(np.random.default_rng(seed), batch, length, documents)
    return window_intervals(document_start(tokens), window_blocks)


def value_and_gradients(attention, qkv, first_v, value_residual, dout, other_dv, intervals):
    """By name: the output, the values and the gradients of what these were made of."""
    _, length, heads, width = dout.shape

    def run(qkv, first_v, value_residual):
        tables = rotary_tables(length, width)
        out, v = attention(qkv, first_v, value_residual, tables, intervals, heads, SCALE)
        return (out, v) if other_dv is not None else (out, jax.lax.stop_gradient(v))

    results, pullback = jax.vjp(run, qkv, first_v, value_residual)
    gradients = pullback((dout, jnp.zeros_like(dout) if other_dv is None else other_dv))
    return dict(zip(NAMES, (*results, *gradients) if first_v is not None else (*results, gradients[0])))


def check(results, inputs, intervals, bound=5e-3, **options):
    """Against float32 and dense attention, from which bfloat16 differs by its roundings."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    dense = functools.partial(attend_heads, implementation="dense", **options)
    reference = jax.jit(functools.partial(value_and_gradients, dense))  # one program: a GPU compiles each operation
    with jax.default_matmul_precision("highest"):
        errors = relative_errors(results, reference(*exact, intervals))
    assert max(errors.values()) < bound, errors
    assert all(x.dtype == jnp.bfloat16 for name, x in results.items() if name != "d_value_residual")


@pytest.fixture
def hopper(monkeypatch):
    """Runs a function whose attention is that for Hopper GPUs, interpreted, as one program: what is begun while the
    interpreter's callbacks run can stop them for ever."""
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: True)

    def run(function, *arguments, **options):
        with interpreted(monkeypatch, **options):
            return jax.block_until_ready(jax.jit(function)(*arguments))

    return run


def on_product(**options):
    return functools.partial(value_and_gradients, functools.partial(attend_heads, implementation="hopper", **options))


@needs_interpreter
@pytest.mark.parametrize("offsets_keys", [False, True], ids=["", "offset keys"])
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_agrees_with_dense(hopper, mixed, read_again, offsets_keys):
    """Where warpgroups end far apart: of the first program's keys, 0 to 63 are seen from 2 tiles of queries and those
    after them from 6, more than the ring holds. Neither its loads nor the first keys' gradients may wait for the rest.
    """
    inputs = random_inputs(1, 1, 384, 1, 64, mixed=mixed, read_again=read_again)
    tokens = jnp.zeros((1, 384), jnp.int32).at[0, jnp.array([20, 70])].set(END_OF_TEXT)
    intervals = window_intervals(document_start(tokens), 3)
    results = hopper(on_product(offsets_keys=offsets_keys), *inputs, intervals)
    check(results, inputs, intervals, offsets_keys=offsets_keys)


@needs_interpreter
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
def test_heads_of_128_without_races(hopper, capsys, read_again):
    inputs = random_inputs(3, 1, 256, 1, 128, read_again=read_again)
    intervals = random_intervals(4, 1, 256, 0.01, 1)
    check(hopper(on_product(), *inputs, intervals, detect_races=True), inputs, intervals)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
def test_two_sequences_of_three_heads(hopper):
    inputs, intervals = random_inputs(5, 2, 128, 3, 64), random_intervals(6, 2, 128, 0.03, 1)
    check(hopper(on_product(), *inputs, intervals), inputs, intervals)


@needs_interpreter
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_values_that_nothing_else_reads_have_a_gradient_of_zeros_from_there(hopper, mixed):
    """To the bit: what is not added, and not read, are zeros."""
    inputs = random_inputs(7, 1, 128, 1, 64, mixed=mixed, read_again=False)
    intervals = random_intervals(8, 1, 128, 0.03, 1)
    results = hopper(on_product(), *inputs, intervals)
    *inputs, _ = inputs
    with_zeros = hopper(on_product(), *inputs, jnp.zeros_like(inputs[-1]), intervals)
    jax.tree.map(np.testing.assert_array_equal, results, with_zeros)


@needs_interpreter
def test_values_alone_have_a_gradient(hopper):
    """Where nothing reads the output."""
    qkv, first_v, value_residual, _, other_dv = random_inputs(18, 1, 128, 1, 64)
    intervals = random_intervals(19, 1, 128, 0.03, 1)

    def gradients(values):
        _, pullback = jax.vjp(values, qkv, first_v, value_residual)
        return dict(zip(NAMES[2:], pullback(other_dv)))

    def attended(*inputs):
        return attend_heads(*inputs, rotary_tables(128, 64), intervals, 1, SCALE, "hopper")[1]

    results = hopper(lambda: gradients(attended))
    assert not jnp.any(results["d_qkv"][..., : 2 * 64])
    references = gradients(lambda *inputs: prepare_heads(*inputs, rotary_tables(128, 64), 1)[2])
    assert max(relative_errors(results, references).values()) < 5e-3


@needs_interpreter
@pytest.mark.parametrize("layer", [1, 2], ids=["paired heads", "key offset and exclusive attention"])
def test_layers(hopper, layer):
    """As a layer uses it, with the gradients of all that goes in."""
    changes = {"dim": 128, "paired_heads": (1,), "key_offset": "all", "exclusive_attention": True, "head_gate": True}
    config = tiny_model(**changes).config
    tokens, inputs = attention_alone.tokens_with_documents(3, 100), attention_alone.random_inputs(config, layer)
    rounded = inputs._replace(x=inputs.x.astype(jnp.bfloat16), first_v=inputs.first_v.astype(jnp.bfloat16))
    weights = [jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(inputs[1:3])]

    def attended(implementation, inputs):
        given = dataclasses.replace(config, attention=implementation)

        def total(inputs):
            results = attention_alone.attention(given, layer, tokens, inputs)
            return sum(jnp.sum(w * x) for w, x in zip(weights, results))

        return jax.grad(total)(inputs)

    def by_name(gradients):
        return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(gradients)}

    results = by_name(hopper(functools.partial(attended, "hopper"), rounded))
    errors = relative_errors(
        results, by_name(attended("dense", jax.tree.map(lambda x: x.astype(jnp.float32), rounded)))
    )
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize("between", [None, lambda q, k, v: (q, k, 2 * v)], ids=["nothing", "something"])
def test_what_changes_in_between_has_gradients_of_its_own(monkeypatch, between):
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: True)
    monkeypatch.setattr("senano_jax.attention.hopper_flash.hopper_attention", lambda q, k, v, *_: v)
    monkeypatch.setattr(heads_attention, "_fused", lambda *_: ("fused", "v"))
    qkv, first_v, value_residual, *_ = random_inputs(9, 1, 128, 1, 64)
    arguments = qkv, first_v, value_residual, rotary_tables(128, 64), random_intervals(9, 1, 128, 0.0, 1), 1, SCALE
    out, v = attend_heads(*arguments, between=between)
    if between is None:
        assert (out, v) == ("fused", "v")
    else:
        _, _, own_v = prepare_heads(*arguments[:4], 1)
        np.testing.assert_array_equal(v, 2 * own_v)


def sharded_gradients(attend):
    """Those of x and of what layers are made of, over two devices. The attention of a layer is `attend(x, first_v,
    *of_layer, tables, intervals)`."""

    def loss(x, of_layers, key_start, query_end):
        """As the model uses it: the first layer's values are mixed into those of others, scanned and rematerialised."""
        tables = rotary_tables(x.shape[1], 64)
        keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

        @functools.partial(jax.checkpoint, policy=keep)
        def layer(x, first_v, of_layer):
            return attend(x, first_v, *of_layer, tables, Intervals(key_start, query_end))

        def added(x, out):
            out = out.reshape(*x.shape[:2], -1)
            return x + jnp.tile(out, x.shape[2] // out.shape[2])

        first, others = (jax.tree.map(lambda z, part=part: z[part], of_layers) for part in (0, slice(1, None)))
        out, first_v = layer(x, None, first)
        x, _ = jax.lax.scan(lambda x, given: (added(x, layer(x, first_v, given)[0]), None), added(x, out), others)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def summed(*arguments):
        d_x, d_of_layers = jax.grad(loss, argnums=(0, 1))(*arguments)
        return d_x, jax.lax.psum(d_of_layers, "d")

    mesh, rows = Mesh(np.array(jax.devices()[:2]), "d"), PartitionSpec("d")
    of_rows = rows, PartitionSpec(), rows, rows
    return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=of_rows, out_specs=of_rows[:2], check_vma=False))


def check_layers_on_gpu(monkeypatch, attend, arguments, seed):
    """Against attention that is not for Hopper GPUs alone."""
    intervals = random_intervals(seed, 4, 512, 0.01, 2)
    results = sharded_gradients(attend)(*arguments, *intervals)
    monkeypatch.setattr(heads_attention, "takes_hopper", lambda *_: False)
    references = sharded_gradients(attend)(*arguments, *intervals)
    errors = relative_errors(*(dict(enumerate(jax.tree.leaves(x))) for x in (results, references)))
    assert max(errors.values()) < 2e-2, errors


def attend_layer(qkv, first_v, share, tables, intervals):
    return attend_heads(qkv, first_v, share, tables, intervals, 2, SCALE)


def layers_arguments(array, length=256):
    return array((4, length, 6 * 64), jnp.bfloat16), (array((3,), jnp.float32),)


@needs_lowering
def test_lowers_inside_scan_remat_and_shard_map(monkeypatch):
    """Of the first layer's kernel of keys and values one input more is the gradient from all others, three fewer what
    is mixed in. That of the others takes no zeros for values that nothing reads again."""
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: True)
    bounds = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    text = lowered(sharded_gradients(attend_layer), *layers_arguments(jax.ShapeDtypeStruct), bounds, bounds)
    inputs = [len(names.split(",")) for names in re.findall(r"@mosaic_gpu_v2\((.*?)\)", text)]
    forward, queries, keys = 4, 7 + 3, 8 + 3
    assert sorted(inputs) == sorted([forward, forward, queries, keys + 1, keys + 3])


@needs_lowering
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("offsets_keys", [False, True], ids=["", "offset keys"])
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_lowers_for_cuda(monkeypatch, mixed, read_again, offsets_keys, width):
    """The kernels pass through Pallas into Mosaic GPU's language; no GPU takes part. Shared memory suffices."""
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: True)
    inputs = jax.eval_shape(functools.partial(random_inputs, 10, 2, 1024, 4, width, mixed=mixed, read_again=read_again))
    bounds = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    run = jax.jit(on_product(offsets_keys=offsets_keys))
    assert lowered(run, *inputs, Intervals(bounds, bounds)).count("mosaic_gpu_v2") == 3


def stored(qkv, first_v, value_residual, rotary, intervals, heads, scale, *, offsets_keys):
    """The same with the gradients of queries, keys and values in memory."""
    q, k, v = prepare_heads(qkv, first_v, value_residual, rotary, heads, offsets_keys=offsets_keys)
    return hopper_attention(q, k, v, intervals, scale, True)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("offsets_keys", [False, True], ids=["", "offset keys"])
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize("width", [64, 128])
def test_agrees_with_dense_on_gpu(width, mixed, read_again, offsets_keys):
    inputs = random_inputs(11, 1, 4096, 2, width, mixed=mixed, read_again=read_again)
    run = jax.jit(on_product(offsets_keys=offsets_keys))
    for window_blocks in (1, 3, 14, 32):
        intervals = random_intervals(12, 1, 4096, 0.002, window_blocks)
        check(run(*inputs, intervals), inputs, intervals, 1e-2, offsets_keys=offsets_keys)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("offsets_keys", [False, True], ids=["", "offset keys"])
def test_agrees_with_stored_gradients_at_the_record_s_sizes_and_has_the_same_bits_every_time(offsets_keys):
    inputs = random_inputs(13, 2, 16384, 6, 128)
    run = jax.jit(on_product(offsets_keys=offsets_keys))
    of_stored = jax.jit(functools.partial(value_and_gradients, functools.partial(stored, offsets_keys=offsets_keys)))
    for window_blocks in (1, 14):
        intervals = random_intervals(14, 2, 16384, 1 / 720, window_blocks)
        results = run(*inputs, intervals)
        errors = relative_errors(results, of_stored(*inputs, intervals))
        assert max(errors.values()) < 5e-3, errors
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, run(*inputs, intervals), results)


@pytest.mark.gpu
@on_hopper
def test_inside_scan_remat_and_shard_map_on_gpu(monkeypatch):
    rng = np.random.default_rng(15)
    arguments = layers_arguments(lambda shape, dtype: jnp.asarray(0.5 * rng.standard_normal(shape), dtype), 512)
    check_layers_on_gpu(monkeypatch, attend_layer, arguments, 16)
