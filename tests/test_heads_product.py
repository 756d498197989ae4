"""Queries, keys and values that are made inside the product: interpreted, lowered for a GPU, on one, and where the
product is stored instead."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import attention_alone
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted, needs_interpreter
from test_flash import SCALE
from test_heads import relative_errors
from test_heads_attention import check_layers_on_gpu, random_intervals, sharded_gradients
from test_hopper_flash import lowered, needs_lowering, on_hopper
from tiny import tiny_model

from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import Tile
from senano_jax.model import heads_attention
from senano_jax.model.heads import prepare_heads
from senano_jax.model.heads_attention import attend_heads, attend_product
from senano_jax.model.heads_product import heads_matmul
from senano_jax.model.rotary import rotary_tables

NAMES = ("out", "v", "d_x", "d_w", "d_first_v", "d_value_residual")
SMALL = Tile(rows=64, columns=128, stages=2, shared="b")


def random_inputs(seed, batch, length, depth, heads, width, *, slots=1, mixed=True, dtype=jnp.bfloat16):
    """x, w, first_v or None, value_residual, and the gradients of the output and of the values. first_v is so much like
    the first gradient that the sum over both, value_residual's, does not vanish."""
    rng = np.random.default_rng(seed)
    of_heads = (batch, slots * length, heads, width)
    shapes = (batch, length, depth), (depth, slots * 3 * heads * width), *[of_heads] * 3
    x, w, first_v, dout, other_dv = (rng.standard_normal(shape, np.float32) for shape in shapes)
    arrays = x, w / depth**0.5, (first_v + dout) / 2, dout, other_dv
    x, w, first_v, dout, other_dv = (jnp.asarray(array, dtype) for array in arrays)
    return x, w, first_v if mixed else None, jnp.float32(0.3), dout, other_dv


def heads_in_float32(x, w, first_v, value_residual, heads, slots=1):
    """By name, what `heads_matmul` returns with residuals."""
    batch, length = x.shape[0], slots * x.shape[1]
    x, w, first_v = jax.tree.map(lambda z: z.astype(jnp.float32), (x, w, first_v))
    with jax.default_matmul_precision("highest"):
        qkv = (x @ w).reshape(batch, length, -1)
    width = qkv.shape[2] // (3 * heads)
    q, k, v = prepare_heads(qkv, first_v, value_residual, rotary_tables(length, width), heads, "plain")
    own_q, own_k, own_v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width), 2, 0)
    q_scale, k_scale = (jnp.mean(z * z, axis=-1).swapaxes(1, 2) ** -0.5 for z in (own_q, own_k))
    return {
        "q": q, "k": k, "v": v, "q_scale": q_scale, "k_scale": k_scale, "own_v": None if first_v is None else own_v
    }  # fmt: skip


def check_heads(results, inputs, heads, with_residuals, slots=1, rtol=2**-8, atol=1e-5):
    """Against float32, of which all but the scales are rounded to bfloat16."""
    expected = heads_in_float32(*inputs, heads, slots)
    names = [name for name, x in expected.items() if x is not None and (with_residuals or name in ("q", "k", "v"))]
    assert [name for name, x in results._asdict().items() if x is not None] == names
    for name in names:
        result = getattr(results, name)
        bound = 1e-4 if name.endswith("scale") else rtol
        np.testing.assert_allclose(np.asarray(result, np.float32), expected[name], bound, atol, err_msg=name)


@pytest.fixture
def hopper(monkeypatch):
    """Runs a function with the kernels for Hopper GPUs, interpreted, as one program, on three clusters."""
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=6)])

    def run(function, *arguments, **options):
        with interpreted(monkeypatch, **options):
            return jax.block_until_ready(jax.jit(function)(*arguments))

    return run


def multiply(heads, length, width, **options):
    def run(x, w, first_v, value_residual):
        return heads_matmul(x, w, first_v, value_residual, rotary_tables(length, width), heads, **options)

    return run


@needs_interpreter
@pytest.mark.parametrize("with_residuals", [False, True], ids=["", "residuals"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(
    ("batch", "length", "depth", "heads", "width", "tile"),
    [
        (1, 128, 64, 2, 128, None),  # six tiles, of which each of six blocks takes one; one load
        (2, 256, 384, 4, 64, None),  # several tiles a warpgroup, two heads each; the ring goes round
        (2, 128, 192, 1, 128, None),  # the tiles of a cluster are of two sequences
        (2, 64, 128, 2, 64, SMALL),
        (1, 128, 128, 4, 64, Tile(stages=2, piece=64)),
        (1, 256, 128, 3, 64, Tile(columns=192, stages=2, shared="b", piece=64)),
        (1, 256, 64, 2, 128, Tile(rows=64, columns=256, stages=2, shared="b", piece=256)),
    ],
    ids=["one load", "ring goes round", "two sequences", "small", "pieces", "three pieces", "wide"],
)
def test_heads_interpreted(hopper, capsys, batch, length, depth, heads, width, tile, mixed, with_residuals):
    """With barriers and copies simulated: a wait without a signal hangs, a signal that none waited for is an error."""
    *inputs, _, _ = random_inputs(0, batch, length, depth, heads, width, mixed=mixed)
    run = multiply(heads, length, width, with_residuals=with_residuals, tile=tile)
    check_heads(hopper(run, *inputs, detect_races=True), inputs, heads, with_residuals)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_interpreter
@pytest.mark.parametrize(("heads", "width", "tile"), [(1, 128, None), (2, 64, SMALL)], ids=["one head", "small"])
def test_heads_of_slots_interpreted(hopper, capsys, heads, width, tile):
    """Each row of the product is two rows of heads, at places of their own; two sequences."""
    *inputs, _, _ = random_inputs(12, 2, 256, 64, heads, width, slots=2)
    run = multiply(heads, 512, width, slots=2, with_residuals=True, tile=tile)
    check_heads(hopper(run, *inputs, detect_races=True), inputs, heads, True, slots=2)
    assert "RACE DETECTED" not in capsys.readouterr().out


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


def stored(x, w, *others, slots=1, **options):
    return attend_heads((x @ w).reshape(x.shape[0], slots * x.shape[1], -1), *others, **options)


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
    monkeypatch.setattr(heads_attention, "attend_heads", fail)


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
@pytest.mark.parametrize("options", [{"offsets_keys": True}, {"slots": 2}, {"slots": 2, "offsets_keys": True}], ids=str)
def test_gradients_of_other_layers_interpreted(hopper, capsys, options):
    """Across both ends of two sequences, with the values read again."""
    inputs = random_inputs(13, 2, 256, 64, 2, 64, slots=options.get("slots", 1))
    intervals = random_intervals(14, 2, inputs[-1].shape[1], 0.02, 1)
    results = hopper(on_product(**options), *inputs, intervals, detect_races=True)
    check(results, inputs, intervals, **options)
    assert "RACE DETECTED" not in capsys.readouterr().out


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
    monkeypatch.setattr(heads_attention, "attend_heads", fail)
    errors = relative_errors(hopper(gradients, rounded), exact)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"between": lambda q, k, v: (q, k, v)}),
        ({"dtype": jnp.float32}, {}),
        ({}, {"implementation": "dense"}),
        ({"length": 192}, {}),
        ({"depth": 96}, {}),
        ({"width": 32}, {}),
        ({"heads": 3}, {}),
    ],
    ids=["something between", "float32", "other attention", "length", "depth", "width", "heads"],
)
def test_stores_the_product_where_no_kernel_takes_it_all(monkeypatch, changes, options):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    monkeypatch.setattr(heads_attention, "_fused_product", lambda *_: "not stored")
    monkeypatch.setattr(heads_attention, "attend_heads", lambda *_, **__: "stored")
    sizes = {"batch": 1, "length": 256, "depth": 64, "heads": 2, "width": 64}

    def attended(changes, options):
        *inputs, _, _ = random_inputs(3, **sizes | changes)
        return attend_product(*inputs, None, None, changes.get("heads", 2), SCALE, **options)

    assert attended({}, {}) == "not stored"
    assert attended(changes, options) == "stored"


def test_refuses_what_it_does_not_take():
    *inputs, _, _ = random_inputs(4, 1, 192, 64, 2, 64)
    with pytest.raises(ValueError, match="no kernel for 2 heads of a product"):
        multiply(2, 192, 64)(*inputs)


def attend_layer(x, first_v, w, share, tables, intervals):
    return attend_product(x, w, first_v, share, tables, intervals, 2, SCALE)


def layers_arguments(array, length=256):
    of_layers = array((3, 128, 384), jnp.bfloat16), array((3,), jnp.float32)
    return array((4, length, 128), jnp.bfloat16), of_layers


@pytest.fixture
def lowering(monkeypatch):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=132)])


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
@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("with_residuals", [False, True], ids=["", "residuals"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(
    ("heads", "width", "tile"),
    [(6, 128, None), (12, 64, None), (1, 128, None), (12, 64, Tile(columns=192, stages=4, shared="b", piece=64))],
)
def test_lowers_for_cuda(heads, width, tile, mixed, with_residuals):
    """The kernel passes through Pallas into Mosaic GPU's language; no GPU takes part. Shared memory suffices."""
    *inputs, _, _ = jax.eval_shape(functools.partial(random_shapes, 2, 1024, 768, heads, width, mixed))
    run = jax.jit(multiply(heads, 1024, width, with_residuals=with_residuals, tile=tile))
    assert lowered(run, *inputs).count("mosaic_gpu_v2") == 1


def random_shapes(batch, length, depth, heads, width, mixed):
    return random_inputs(0, batch, length, depth, heads, width, mixed=mixed)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("with_residuals", [False, True], ids=["", "residuals"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(
    ("batch", "length", "depth", "heads", "width", "tile"),
    [
        (1, 128, 64, 2, 128, None),  # one load, and fewer tiles than blocks
        (2, 4096, 768, 6, 128, None),
        (2, 4096, 768, 6, 128, Tile(shared="b")),
        (2, 4096, 768, 6, 128, Tile(rows=64, columns=256, stages=4, shared="b", piece=256)),
        (3, 1024, 384, 12, 64, None),
        (2, 1024, 384, 12, 64, Tile(columns=192, stages=4, shared="b", piece=64)),
    ],
)
def test_heads_on_gpu(batch, length, depth, heads, width, tile, mixed, with_residuals):
    *inputs, _, _ = random_inputs(5, batch, length, depth, heads, width, mixed=mixed)
    run = jax.jit(multiply(heads, length, width, with_residuals=with_residuals, tile=tile))
    check_heads(run(*inputs), inputs, heads, with_residuals, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
@on_hopper
def test_heads_of_slots_on_gpu():
    *inputs, _, _ = random_inputs(15, 2, 4096, 768, 3, 128, slots=2)
    run = jax.jit(multiply(3, 8192, 128, slots=2, with_residuals=True))
    check_heads(run(*inputs), inputs, 3, True, slots=2, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("never_stored")
@OF_LAYERS
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (2, 128)])
def test_gradients_on_gpu(heads, width, mixed, read_again, options):
    *inputs, other_dv = random_inputs(6, 1, 4096, 256, heads, width, mixed=mixed, slots=options.get("slots", 1))
    length = other_dv.shape[1]
    inputs, intervals = (*inputs, other_dv if read_again else None), random_intervals(7, 1, length, 0.002, 3)
    check(jax.jit(on_product(**options))(*inputs, intervals), inputs, intervals, 1e-2, **options)


@pytest.mark.gpu
@on_hopper
@OF_LAYERS
def test_agrees_with_the_stored_product_at_the_record_s_sizes_and_has_the_same_bits_every_time(options):
    slots = options.get("slots", 1)
    inputs = random_inputs(8, 4, 16384, 768, 6 // slots, 128, slots=slots)
    intervals = random_intervals(9, 4, slots * 16384, 1 / 720, 7)
    reference = jax.jit(functools.partial(value_and_gradients, functools.partial(stored, **options)))
    run = jax.jit(on_product(**options))
    results = run(*inputs, intervals)
    errors = relative_errors(results, reference(*inputs, intervals))
    assert max(errors.values()) < 1e-2, errors
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, run(*inputs, intervals), results)


@pytest.mark.gpu
@on_hopper
def test_inside_scan_remat_and_shard_map_on_gpu(monkeypatch):
    rng = np.random.default_rng(10)
    arguments = layers_arguments(lambda shape, dtype: jnp.asarray(0.1 * rng.standard_normal(shape), dtype), 512)
    check_layers_on_gpu(monkeypatch, attend_layer, arguments, 11)
