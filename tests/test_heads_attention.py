"""Attention of a product whose queries, keys and values no memory need hold, nor their gradients: interpreted, lowered
for a GPU, on one, and where they are stored instead."""

import dataclasses
import functools
import re

import attention_alone
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mosaic_interpreter import needs_interpreter
from test_flash import SCALE, random_tokens
from test_heads import relative_errors
from test_heads_product import hopper as hopper
from test_heads_product import lowering as lowering
from test_heads_product import random_inputs
from test_hopper_flash import lowered, needs_lowering, on_hopper
from tiny import tiny_model

from senano_jax.attention import END_OF_TEXT, Intervals, attend, document_start, window_intervals
from senano_jax.kernels import hopper_matmul
from senano_jax.model import heads_attention
from senano_jax.model.heads import prepare_heads
from senano_jax.model.heads_attention import attend_product
from senano_jax.model.rotary import rotary_tables

NAMES = ("out", "v", "d_x", "d_w", "d_first_v", "d_value_residual")


def random_intervals(seed, batch, length, documents, window_blocks):
    tokens = random_tokens(np.random.default_rng(seed), batch, length, documents)
    return window_intervals(document_start(tokens), window_blocks)


def value_and_gradients(attention, x, w, first_v, value_residual, dout, other_dv, intervals):
    """By name: the output, the values and the gradients of what these were made of. Without `other_dv` nothing else
    reads the values."""
    _, length, heads, width = dout.shape

    def run(x, w, first_v, value_residual):
        tables = rotary_tables(length, width)
        out, v = attention(x, w, first_v, value_residual, tables, intervals, heads, SCALE)
        return (out, v) if other_dv is not None else (out, jax.lax.stop_gradient(v))

    results, pullback = jax.vjp(run, x, w, first_v, value_residual)
    gradients = pullback((dout, jnp.zeros_like(dout) if other_dv is None else other_dv))
    return dict(zip(NAMES, (*results, *(gradients if first_v is not None else gradients[:2]))))


def stored(x, w, first_v, share, tables, intervals, heads, scale, implementation="auto", slots=1, **options):
    """The same, with all that is in between in memory."""
    qkv = (x @ w).reshape(x.shape[0], slots * x.shape[1], -1)
    q, k, v = prepare_heads(qkv, first_v, share, tables, heads, **options)
    return attend(q, k, v, intervals, scale, implementation), v


def check(results, inputs, intervals, bound=5e-3, **options):
    """Against float32 and dense attention, from which bfloat16 differs by its roundings."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    attend_stored = functools.partial(stored, implementation="dense", **options)
    dense = jax.jit(functools.partial(value_and_gradients, attend_stored))
    with jax.default_matmul_precision("highest"):
        errors = relative_errors(results, dense(*exact, intervals))
    assert max(errors.values()) < bound, errors
    assert all(x.dtype == jnp.bfloat16 for name, x in results.items() if name != "d_value_residual")


def fail(*_, **__):
    raise AssertionError("the product is stored")


@pytest.fixture
def never_stored(monkeypatch):
    monkeypatch.setattr(heads_attention, "prepare_heads", fail)


def on_product(**options):
    return functools.partial(value_and_gradients, functools.partial(attend_product, implementation="hopper", **options))


OF_LAYERS = pytest.mark.parametrize(
    "options", [{}, {"offsets_keys": True}, {"slots": 2}], ids=["", "offset keys", "slots"]
)


@needs_interpreter
@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(
    ("batch", "heads", "width"), [(2, 2, 64), (1, 1, 128)], ids=["two sequences of two heads", "a wide head"]
)
def test_gradients_interpreted(hopper, capsys, batch, heads, width, mixed, read_again):
    *inputs, other_dv = random_inputs(1, batch, 256, 64, heads, width, mixed=mixed)
    inputs, intervals = (*inputs, other_dv if read_again else None), random_intervals(2, batch, 256, 0.02, 1)
    check(hopper(on_product(), *inputs, intervals, detect_races=True), inputs, intervals)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize("options", [{"offsets_keys": True}, {"slots": 2}], ids=["offset keys", "slots"])
def test_gradients_of_other_layers_interpreted(hopper, capsys, options, mixed):
    """Across both ends of two sequences, with the values read again."""
    inputs = random_inputs(13, 2, 256, 64, 2, 64, slots=options.get("slots", 1), mixed=mixed)
    intervals = random_intervals(14, 2, inputs[-1].shape[1], 0.02, 1)
    results = hopper(on_product(**options), *inputs, intervals, detect_races=True)
    check(results, inputs, intervals, **options)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.usefixtures("never_stored")
@OF_LAYERS
def test_what_evaluations_run_has_the_same_bits(hopper, options):
    """Without a gradient nothing is kept for one."""
    inputs = random_inputs(20, 1, 256, 64, 2, 64, slots=options.get("slots", 1))
    intervals = random_intervals(21, 1, inputs[-1].shape[1], 0.02, 1)
    results = hopper(on_product(**options), *inputs, intervals)
    *inputs, dout, _ = inputs
    _, length, heads, width = dout.shape

    def run(*inputs):
        return attend_product(*inputs, rotary_tables(length, width), intervals, heads, SCALE, "hopper", **options)

    for name, x in zip(NAMES, hopper(run, *inputs)):
        np.testing.assert_array_equal(x, results[name], err_msg=name)


@needs_interpreter
@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("options", [{}, {"offsets_keys": True}], ids=["", "offset keys"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_warpgroups_that_end_far_apart(hopper, mixed, options):
    """Of the first program's keys, 0 to 63 are seen from 2 tiles of queries and those after them from 6, more than the
    ring holds. Neither its loads nor the first keys' gradients may wait for the rest."""
    inputs = random_inputs(16, 2, 384, 64, 1, 128, mixed=mixed)
    tokens = jnp.zeros((2, 384), jnp.int32).at[:, jnp.array([20, 70])].set(END_OF_TEXT)
    intervals = window_intervals(document_start(tokens), 3)
    check(hopper(on_product(**options), *inputs, intervals), inputs, intervals, **options)


@needs_interpreter
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_values_that_nothing_else_reads_have_a_gradient_of_zeros_from_there(hopper, mixed):
    """To the bit: what is not added, and not read, are zeros."""
    *inputs, other_dv = random_inputs(17, 1, 128, 64, 2, 64, mixed=mixed)
    intervals = random_intervals(8, 1, 128, 0.03, 1)
    results = hopper(on_product(), *inputs, None, intervals)
    with_zeros = hopper(on_product(), *inputs, jnp.zeros_like(other_dv), intervals)
    jax.tree.map(np.testing.assert_array_equal, results, with_zeros)


@needs_interpreter
def test_values_alone_have_a_gradient(hopper):
    """Where nothing reads the output."""
    x, w, first_v, value_residual, _, other_dv = random_inputs(18, 1, 128, 64, 2, 64)
    intervals = random_intervals(19, 1, 128, 0.03, 1)

    def gradients(values):
        _, pullback = jax.vjp(values, x, w, first_v, value_residual)
        return dict(zip(NAMES[2:], pullback(other_dv)))

    def attended(*inputs):
        return attend_product(*inputs, rotary_tables(128, 64), intervals, 2, SCALE, "hopper")[1]

    results = hopper(lambda: gradients(attended))
    assert not jnp.any(results["d_w"][:, : 2 * 128])
    references = gradients(lambda x, w, *others: prepare_heads(x @ w, *others, rotary_tables(128, 64), 2)[2])
    assert max(relative_errors(results, references).values()) < 5e-3


def test_values_that_are_changed_are_what_attention_takes(monkeypatch):
    monkeypatch.setattr(heads_attention, "attend", lambda q, k, v, *_, **__: v)
    x, w, first_v, value_residual, *_ = random_inputs(9, 1, 128, 64, 1, 64)
    tables, intervals = rotary_tables(128, 64), random_intervals(9, 1, 128, 0.0, 1)
    arguments = x, w, first_v, value_residual, tables, intervals, 1, SCALE
    out, v = attend_product(*arguments, values=lambda v: 2 * v)
    _, _, own_v = prepare_heads(x @ w, first_v, value_residual, tables, 1)
    np.testing.assert_array_equal(out, 2 * own_v)
    np.testing.assert_array_equal(v, 2 * own_v)


@needs_interpreter
@pytest.mark.parametrize(
    "changes", [{}, {"key_offset": "all"}, {"num_heads": 4, "dim": 256, "paired_heads": (1,)}],
    ids=["", "key offset", "paired heads"],
)  # fmt: skip
def test_a_layer(monkeypatch, hopper, changes):
    """As a layer uses it, with the gradients of all that goes in."""
    options = {"dim": 128, "num_heads": 2, "exclusive_attention": True, "head_gate": True}
    config = tiny_model(**options | changes).config
    tokens, inputs = attention_alone.tokens_with_documents(3, 100), attention_alone.random_inputs(config, 1)
    rounded = inputs._replace(x=inputs.x.astype(jnp.bfloat16), first_v=inputs.first_v.astype(jnp.bfloat16))
    weights = [jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(inputs[1:3])]

    def gradients(inputs, implementation="hopper"):
        def total(inputs):
            given = dataclasses.replace(config, attention=implementation)
            results = attention_alone.attention(given, 1, tokens, inputs)
            return sum(jnp.sum(w * x) for w, x in zip(weights, results))

        return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(jax.grad(total)(inputs))}

    exact = gradients(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), "dense")
    monkeypatch.setattr(heads_attention, "prepare_heads", fail)
    errors = relative_errors(hopper(gradients, rounded), exact)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"values": lambda v: v}),
        ({"dtype": jnp.float32}, {}),
        ({}, {"implementation": "dense"}),
        ({"length": 192}, {}),
        ({"depth": 96}, {}),
        ({"width": 32}, {}),
        ({"heads": 3}, {}),
    ],
    ids=["other values", "float32", "other attention", "length", "depth", "width", "heads"],
)
def test_stores_the_product_where_no_kernel_takes_it_all(monkeypatch, changes, options):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    monkeypatch.setattr(heads_attention, "_fused", lambda *_: "not stored")
    monkeypatch.setattr(heads_attention, "prepare_heads", lambda *_, **__: "qkv")
    monkeypatch.setattr(heads_attention, "attend", lambda *_, **__: "stored")
    sizes = {"batch": 1, "length": 256, "depth": 64, "heads": 2, "width": 64}

    def attended(changes, options):
        *inputs, _, _ = random_inputs(3, **sizes | changes)
        return attend_product(*inputs, None, None, changes.get("heads", 2), SCALE, with_values=True, **options)

    assert attended({}, {}) == "not stored"
    assert attended(changes, options) == "stored"


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
    """Against the same with the product, and queries, keys and values, in memory."""
    intervals = random_intervals(seed, 4, 512, 0.01, 2)
    results = sharded_gradients(attend)(*arguments, *intervals)
    monkeypatch.setattr(heads_attention, "takes_hopper", lambda *_: False)
    references = sharded_gradients(attend)(*arguments, *intervals)
    errors = relative_errors(*(dict(enumerate(jax.tree.leaves(x))) for x in (results, references)))
    assert max(errors.values()) < 2e-2, errors


def attend_layer(x, first_v, w, share, tables, intervals):
    return attend_product(x, w, first_v, share, tables, intervals, 2, SCALE)


def layers_arguments(array, length=256):
    of_layers = array((3, 128, 384), jnp.bfloat16), array((3,), jnp.float32)
    return array((4, length, 128), jnp.bfloat16), of_layers


@needs_lowering
@pytest.mark.usefixtures("lowering", "never_stored")
def test_lowers_inside_scan_remat_and_shard_map():
    """The first layer and those of the scan multiply forward and once more backward: out and its log-sum-exp are kept,
    what they were made of is not. The first layer's kernel of keys and values has one input more, the gradient from
    all others, and its products and that kernel have none of what is mixed in."""
    bounds = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    text = lowered(sharded_gradients(attend_layer), *layers_arguments(jax.ShapeDtypeStruct), bounds, bounds)
    inputs = [len(names.split(",")) for names in re.findall(r"@mosaic_gpu_v2\((.*?)\)", text)]
    product, attention, queries, keys = 4, 4, 7 + 3, 8 + 3
    assert sorted(inputs) == sorted([product, product + 2, attention] * 2 + [queries, keys + 1, keys + 3])


@needs_lowering
@pytest.mark.usefixtures("lowering", "never_stored")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_lowers_for_cuda(mixed, slots, width):
    """The kernels pass through Pallas into Mosaic GPU's language; no GPU takes part. Shared memory suffices."""
    inputs = jax.eval_shape(lambda: random_inputs(10, 2, 1024, 256, 4, width, slots=slots, mixed=mixed))
    bounds = jax.ShapeDtypeStruct((2, slots * 1024), jnp.int32)
    run = jax.jit(on_product(slots=slots))
    assert lowered(run, *inputs, Intervals(bounds, bounds)).count("mosaic_gpu_v2") == 4


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("never_stored")
@OF_LAYERS
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (2, 128)])
def test_gradients_on_gpu(heads, width, mixed, read_again, options):
    *inputs, other_dv = random_inputs(6, 1, 4096, 256, heads, width, mixed=mixed, slots=options.get("slots", 1))
    inputs, length, run = (*inputs, other_dv if read_again else None), other_dv.shape[1], jax.jit(on_product(**options))
    for window_blocks in (1, 3, 14, 32):
        intervals = random_intervals(7, 1, length, 0.002, window_blocks)
        check(run(*inputs, intervals), inputs, intervals, 1e-2, **options)


@pytest.mark.gpu
@on_hopper
@OF_LAYERS
def test_agrees_with_the_stored_product_at_the_record_s_sizes_and_has_the_same_bits_every_time(options):
    slots = options.get("slots", 1)
    inputs = random_inputs(8, 4, 16384, 768, 6 // slots, 128, slots=slots)
    reference = jax.jit(functools.partial(value_and_gradients, functools.partial(stored, **options)))
    run = jax.jit(on_product(**options))
    for window_blocks in (1, 7, 14):
        intervals = random_intervals(9, 4, slots * 16384, 1 / 720, window_blocks)
        results = run(*inputs, intervals)
        errors = relative_errors(results, reference(*inputs, intervals))
        assert max(errors.values()) < 1e-2, errors
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, run(*inputs, intervals), results)


@pytest.mark.gpu
@on_hopper
def test_inside_scan_remat_and_shard_map_on_gpu(monkeypatch):
    rng = np.random.default_rng(10)
    arguments = layers_arguments(lambda shape, dtype: jnp.asarray(0.1 * rng.standard_normal(shape), dtype), 512)
    check_layers_on_gpu(monkeypatch, attend_layer, arguments, 11)
