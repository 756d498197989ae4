"""The product with an epilogue: interpreted, on a Hopper GPU, and what it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted, needs_interpreter
from tune_matmul import CANDIDATES, parse_tile

from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import SHARED_MEMORY, TILES, Tile, tile_for


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


def test_refuses_a_product_that_its_tile_does_not_divide():
    a, b, _ = operands(128, 64, 256)
    with pytest.raises(ValueError, match="no kernel"):
        hopper_matmul.matmul(a, b, identity, tile=Tile(columns=64, piece=64, shared="b"))


@pytest.mark.parametrize(
    ("rows", "columns", "index"), [(32768, 3072, 0), (32768, 2816, 1), (128 * 77, 3072, 1), (256, 192, 0)]
)
def test_a_product_takes_the_first_tile_that_divides_it(rows, columns, index):
    assert tile_for(rows, 768, columns) == TILES[index]
    assert hopper_matmul.fits(rows, 768, columns, jnp.bfloat16)


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group": 0}, "group of a tile is 0; it must be at least 1"),
        ({"stages": 1}, "stages of a tile is 1; it must be at least 2"),
        ({"shared": "c"}, "shared of a tile is 'c'; it must be a or b"),
        ({"rows": 96}, "rows of a tile are 96; they must be a multiple of 64"),
        ({"piece": 32}, "piece of a tile is 32; it must be a multiple of 64"),
        ({"columns": 320, "piece": 64}, "columns of a tile are 320; one instruction multiplies 256 at most"),
        ({"columns": 192}, "columns of a tile are 192; its piece, 128, does not divide them"),
        ({"stages": 6}, f"a tile takes 262144 bytes of shared memory; a block has {SHARED_MEMORY}"),
        ({"columns": 256, "stages": 2, "piece": 64}, "a tile takes 256 accumulators of a thread, which has 192"),
    ],
)
def test_refuses_tiles_that_no_multiprocessor_takes(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Tile(**sizes)


def test_what_a_tile_takes():
    """Worked out by hand: the ring of loads, 2 bytes a number, and what the warpgroups store from."""
    wide, square = TILES
    assert wide.shared_memory == 4 * (128 + 192) * 64 * 2 + 2 * 128 * 64 * 2
    assert square.shared_memory == 5 * (128 + 128) * 64 * 2 + 2 * 128 * 128 * 2
    assert (wide.accumulators, square.accumulators) == (128 * 192 / 128, 128 * 128 / 128)
    assert (wide.cluster_rows, wide.cluster_columns) == (256, 192)
    assert (square.cluster_rows, square.cluster_columns) == (128, 256)


def check_products(rows, depth, columns, tile=None):
    a, b, side = operands(rows, depth, columns)
    product = (a.astype(jnp.float32) @ b.astype(jnp.float32)).astype(jnp.bfloat16)
    # Sums in another order may round the other way: one unit in the last place.
    for result, expected in (
        (hopper_matmul.matmul(a, b, identity, tile=tile), product),
        (hopper_matmul.matmul(a, b, scaled_sum, side, tile), scaled_sum(product, side)),
    ):
        result, expected = (np.asarray(x, np.float32) for x in (result, expected))
        np.testing.assert_allclose(result, expected, rtol=2**-7, atol=2**-7)


@needs_interpreter
@pytest.mark.parametrize(
    "tile", [*TILES, Tile(rows=64, stages=2, shared="b", piece=64)], ids=["wide", "square", "short ring"]
)
# One load; fewer loads than the ring; fewer tiles than clusters; tiles that are left over, and the ring gone round.
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 64, 1), (1, 192, 1), (1, 384, 1), (7, 192, 2)])
def test_products_interpreted(monkeypatch, capsys, tile, rows, depth, columns):
    """With barriers and copies simulated: a wait without a signal hangs, a signal that none waited for is an error."""
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=6)])
    with interpreted(monkeypatch, detect_races=True):
        check_products(rows * tile.cluster_rows, depth, columns * tile.cluster_columns, tile)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", CANDIDATES)
# One tile or few; a product shorter than the ring of loads; tiles that are left over at the end.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(256, 64, 768), (1024, 768, 768), (40960, 128, 768), (256 * 77, 768, 3072)]
)
def test_candidates(name, rows, depth, columns):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check_products(rows, depth, columns, parse_tile(name))


@pytest.mark.gpu
# One tile; fewer tiles than clusters; a product shorter than the ring of loads; tiles that are left over at the end.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(128, 64, 256), (1024, 768, 512), (40960, 128, 256), (128 * 77, 768, 3072)]
)
def test_products(rows, depth, columns):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check_products(rows, depth, columns)
