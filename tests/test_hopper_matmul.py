"""The product with an epilogue: interpreted, on a Hopper GPU, and what it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.kernels import hopper_matmul


def scaled_sum(product, side):
    return product * jnp.bfloat16(0.5) + side


def identity(product):
    return product


def operands(rows, depth, columns):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, side = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((rows, depth), (depth, columns), (rows, columns)))
    )
    return a, b / depth**0.5, side


@pytest.mark.parametrize(("rows", "depth", "columns"), [(100, 64, 256), (128, 96, 256), (128, 64, 384)])
def test_refuses_sizes_that_are_no_whole_tiles(rows, depth, columns):
    assert not hopper_matmul.fits(rows, depth, columns, jnp.bfloat16)
    a, b, _ = operands(rows, depth, columns)
    with pytest.raises(ValueError, match="no kernel"):
        hopper_matmul.matmul(a, b, identity)


def test_refuses_float32():
    assert not hopper_matmul.fits(128, 64, 256, jnp.float32)


@pytest.mark.parametrize(
    ("version", "capability", "runs"),
    [((0, 11, 0), "9.0", True), ((0, 10, 2), "9.0", False), ((0, 11, 0), "8.0", False)],
)
def test_runs_on_hopper_with_a_jax_that_can_compile_it(monkeypatch, version, capability, runs):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert hopper_matmul.runs_here() == runs


def check_products(rows, depth, columns):
    a, b, side = operands(rows, depth, columns)
    product = (a.astype(jnp.float32) @ b.astype(jnp.float32)).astype(jnp.bfloat16)
    # Sums in another order may round the other way: one unit in the last place.
    for result, expected in (
        (hopper_matmul.matmul(a, b, identity), product),
        (hopper_matmul.matmul(a, b, scaled_sum, side), scaled_sum(product, side)),
    ):
        result, expected = (np.asarray(x, np.float32) for x in (result, expected))
        np.testing.assert_allclose(result, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no barriers of clusters")
# One load; fewer loads than the ring; fewer tiles than clusters; tiles that are left over, and the ring gone round.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(128, 64, 256), (128, 192, 256), (128, 384, 256), (896, 192, 512)]
)
def test_products_interpreted(monkeypatch, capsys, rows, depth, columns):
    """With barriers and copies simulated: a wait without a signal hangs, a signal that none waited for is an error."""
    if jax.default_backend() == "gpu":
        pytest.skip("the kernel itself runs here")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=6)])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        check_products(rows, depth, columns)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
# One tile; fewer tiles than clusters; a product shorter than the ring of loads; tiles that are left over at the end.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(128, 64, 256), (1024, 768, 512), (40960, 128, 256), (128 * 77, 768, 3072)]
)
def test_products(rows, depth, columns):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check_products(rows, depth, columns)
