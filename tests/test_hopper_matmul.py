"""The product with an epilogue: interpreted, on a Hopper GPU, and what it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tune_matmul import LAUNCHES, parse_launch

from senano_jax.kernels import hopper_matmul
from senano_jax.kernels.hopper_tile import DEFAULT_TILE, SHARED_MEMORY, Tile


def scaled_sum(product, side):
    return product * jnp.bfloat16(0.5) + side


def identity(product):
    return product


OVERLAPPED = Tile(columns=256, stages=4, form="overlapped", shared="b", piece=64, buffers=2)
SMALL_TILES = {
    "wide, b shared": Tile(rows=64, columns=256, stages=4, shared="b", piece=64, buffers=2),
    "cooperative, a shared": Tile(rows=256, columns=64, stages=3, form="cooperative", piece=64),
    "cooperative, b shared": Tile(stages=3, form="cooperative", shared="b", piece=64, buffers=2, lead=2),
    "overlapped, a shared": Tile(rows=256, columns=64, stages=4, form="overlapped", piece=64),
    "overlapped, b shared": Tile(stages=4, form="overlapped", shared="b", piece=64, lead=1),
    "overlapped, room for all pieces": Tile(stages=3, form="overlapped", shared="b", piece=64, buffers=2),
}


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"stages": 0}, "stages of a tile is 0; it must be at least 1"),
        ({"lead": -1}, "lead of a tile is -1; it must be at least 0"),
        ({"lead": 1}, "lead of a tile is 1; ping-pong with 5 stages takes 0 at most"),
        (
            {"lead": 3, "stages": 3, "form": "cooperative"},
            "lead of a tile is 3; cooperative with 3 stages takes 2 at most",
        ),
        ({"form": "pong"}, "form of a tile is 'pong'; it must be one of ping-pong, cooperative, overlapped"),
        ({"shared": "c"}, "shared of a tile is 'c'; it must be a or b"),
        ({"rows": 96}, "rows of a tile are 96; ping-pong needs a multiple of 64"),
        (
            {"rows": 64, "form": "cooperative"},
            "rows of a tile are 64; cooperative needs a multiple of 128",
        ),
        ({"piece": 32}, "piece of a tile is 32; it must be a multiple of 64"),
        ({"columns": 320, "piece": 64}, "columns of a tile are 320; one instruction multiplies 256 at most"),
        ({"columns": 192}, "columns of a tile are 192; they must be a multiple of 1 x 128"),
        ({"stages": 6}, f"a tile takes 262144 bytes of shared memory; a block has {SHARED_MEMORY}"),
        (
            {"columns": 256, "stages": 2, "piece": 64},
            "a tile takes 256 registers of a thread for its values; there are 192",
        ),
    ],
)
def test_refuses_tiles_that_no_multiprocessor_takes(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Tile(**sizes)


def test_what_a_tile_takes():
    """Worked out by hand: the ring of loads, 2 bytes a number, and what the warpgroups store from."""
    assert DEFAULT_TILE.shared_memory == 5 * (128 + 128) * 64 * 2 + 2 * 128 * 128 * 2
    assert DEFAULT_TILE.value_registers == 128 * 128 / 128
    assert OVERLAPPED.shared_memory == 4 * (128 + 256) * 64 * 2 + 2 * 2 * 64 * 64 * 2
    assert OVERLAPPED.value_registers == 64 * 256 / 128 + 64 * 256 / 2 / 128
    assert (OVERLAPPED.cluster_rows, OVERLAPPED.cluster_columns) == (256, 256)


def test_an_overlapped_tile_needs_products_for_its_pieces():
    assert not OVERLAPPED.divides(256, 7 * 64, 256)
    assert OVERLAPPED.divides(256, 8 * 64, 256)


def check_products(rows, depth, columns, tile=DEFAULT_TILE):
    a, b, side = operands(rows, depth, columns)
    product = (a.astype(jnp.float32) @ b.astype(jnp.float32)).astype(jnp.bfloat16)
    # Sums in another order may round the other way: one unit in the last place.
    for result, expected in (
        (hopper_matmul.matmul(a, b, identity, tile=tile), product),
        (hopper_matmul.matmul(a, b, scaled_sum, side, tile), scaled_sum(product, side)),
    ):
        result, expected = (np.asarray(x, np.float32) for x in (result, expected))
        np.testing.assert_allclose(result, expected, rtol=2**-7, atol=2**-7)


@pytest.fixture
def interpreted(monkeypatch, capsys):
    """Barriers and copies are simulated: a wait without a signal hangs, a signal that none waited for is an error."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 interprets no barriers of clusters")
    if jax.default_backend() == "gpu":
        pytest.skip("the kernel itself runs here")

    def run(*arguments, clusters):
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=2 * clusters)])
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            check_products(*arguments)
        assert "RACE DETECTED" not in capsys.readouterr().out

    return run


# One load; fewer loads than the ring; fewer tiles than clusters; tiles that are left over, and the ring gone round.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(128, 64, 256), (128, 192, 256), (128, 384, 256), (896, 192, 512)]
)
def test_products_interpreted(interpreted, rows, depth, columns):
    interpreted(rows, depth, columns, clusters=3)


@pytest.mark.parametrize("name", SMALL_TILES)
def test_forms_interpreted(interpreted, name):
    """One tile, of as few products as the form takes, and a cluster without; three tiles for one, two for the other."""
    tile = SMALL_TILES[name]
    depth = tile.depth * 2 * tile.pieces if tile.form == "overlapped" else tile.depth
    interpreted(tile.cluster_rows, depth, tile.cluster_columns, tile, clusters=2)
    interpreted(5 * tile.cluster_rows, depth + tile.depth, tile.cluster_columns, tile, clusters=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
# One tile or few; as few products as all forms take; tiles that are left over at the end.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(256, 512, 768), (1024, 768, 768), (40960, 512, 768), (256 * 77, 768, 3072)]
)
def test_launches(name, rows, depth, columns):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check_products(rows, depth, columns, parse_launch(name))


@pytest.mark.gpu
# One tile; fewer tiles than clusters; a product shorter than the ring of loads; tiles that are left over at the end.
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(128, 64, 256), (1024, 768, 512), (40960, 128, 256), (128 * 77, 768, 3072)]
)
def test_products(rows, depth, columns):
    if not hopper_matmul.runs_here():
        pytest.skip("needs a Hopper GPU")
    check_products(rows, depth, columns)
