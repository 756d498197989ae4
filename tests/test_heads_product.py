"""Queries, keys and values that are made inside the product: interpreted, lowered for a GPU, and on one."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted, needs_interpreter
from test_hopper_flash import lowered, needs_lowering, on_hopper

from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import Tile
from senano_jax.model.heads import prepare_heads
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
@pytest.mark.parametrize("with_residuals", [False, True], ids=["", "residuals"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
@pytest.mark.parametrize(
    ("heads", "width", "tile"), [(1, 128, None), (3, 128, None), (2, 64, SMALL)], ids=["one head", "three", "small"]
)
def test_heads_of_slots_interpreted(hopper, capsys, heads, width, tile, mixed, with_residuals):
    """Each row of the product is two rows of heads, at places of their own; two sequences."""
    *inputs, _, _ = random_inputs(12, 2, 128, 64, heads, width, slots=2, mixed=mixed)
    run = multiply(heads, 256, width, slots=2, with_residuals=with_residuals, tile=tile)
    check_heads(hopper(run, *inputs, detect_races=True), inputs, heads, with_residuals, slots=2)
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_refuses_what_it_does_not_take():
    *inputs, _, _ = random_inputs(4, 1, 192, 64, 2, 64)
    with pytest.raises(ValueError, match="no kernel for 2 heads of a product"):
        multiply(2, 192, 64)(*inputs)


@pytest.fixture
def lowering(monkeypatch):
    monkeypatch.setattr(hopper_matmul, "runs_here", lambda: True)
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=132)])


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
