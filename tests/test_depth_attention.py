"""Attention over depth: on a CPU the fused kernels run interpreted, the same code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_variants import at_depth

from senano_jax.config import LayerSchedule, changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.kernels.triton import Launches, RowLaunch
from senano_jax.model.depth_attention import attend_depth
from senano_jax.presets import preset

BLOCKS, WIDTH = 4, 96  # three parts of 32
BOTH = pytest.mark.parametrize("implementation", ["plain", "fused"])
OWN = pytest.mark.parametrize("with_own", [False, True])


def random(with_own, dtype=jnp.float32, width=WIDTH):
    """Blocks of different sizes, what a block has added so far, a query that tells them apart, and two gradients."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = jnp.array([1, 0.3, 4, 2])[:, None, None, None]
    blocks = (sizes * jax.random.normal(keys[0], (BLOCKS, 2, 8, width))).astype(dtype)
    own = jax.random.normal(keys[1], (2, 8, width)).astype(dtype) if with_own else None
    gradients = jax.random.normal(keys[3], (2, 8, width)), jax.random.normal(keys[4], blocks.shape)
    return blocks, own, 2 * jax.random.normal(keys[2], (width,)), [g.astype(dtype) for g in gradients]


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@BOTH
@OWN
@pytest.mark.parametrize("count", [1, 3, BLOCKS])
def test_it_is_the_weighted_sum_of_the_sources(implementation, with_own, count):
    """Those that are complete, with softmax weights times their number; blocks come out as they went in."""
    blocks, own, query, _ = random(with_own)
    read, same = attend_depth(blocks, own, query, jnp.int32(count), implementation)
    sources = float64(*blocks[:count], *([own] if with_own else []))
    np.testing.assert_allclose(read, at_depth(np.asarray(query, np.float64), sources), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(same, blocks)


@BOTH
@OWN
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_float64(implementation, with_own, count):
    """Central differences along random directions, of each input alone; later readers' gradients are added."""
    blocks, own, query, (d_read, d_blocks) = random(with_own)
    inputs = (blocks, query) if own is None else (blocks, query, own)

    def attended(blocks, query, own=None):
        return attend_depth(blocks, own, query, jnp.int32(count), implementation)

    _, pull_back = jax.vjp(attended, *inputs)
    d_read64, d_blocks64 = float64(d_read, d_blocks)

    def value(blocks, query, own=None):
        sources = [*blocks[:count], *([] if own is None else [own])]
        return (at_depth(query, sources) * d_read64).sum() + (blocks * d_blocks64).sum()

    rng, step = np.random.default_rng(1), 1e-5
    for at, gradient in enumerate(pull_back((d_read, d_blocks))):
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            up, down = (float64(*inputs) for _ in range(2))
            up[at] += step * direction
            down[at] -= step * direction
            slope = (value(*up) - value(*down)) / (2 * step)
            found = (np.asarray(gradient, np.float64) * direction).sum()
            assert abs(found - slope) < 1e-5 * np.linalg.norm(gradient) * np.sqrt(gradient.size) + 1e-5, at


@BOTH
def test_blocks_that_are_not_complete_count_for_nothing(implementation):
    """However large they are; their gradient is that of later readers alone."""
    blocks, own, query, (d_read, d_blocks) = random(True)
    ruined = blocks.at[2:].set(1e30)
    attended = functools.partial(attend_depth, count=jnp.int32(2), implementation=implementation)
    expected, _ = attended(blocks, own, query)
    (read, _), pull_back = jax.vjp(attended, ruined, own, query)
    np.testing.assert_array_equal(read, expected)
    gradient, *others = pull_back((d_read, d_blocks))
    np.testing.assert_array_equal(gradient[2:], d_blocks[2:])
    assert all(np.all(np.isfinite(other)) for other in others)


@BOTH
def test_equal_weights_give_the_sum(implementation):
    """Of a zero query, as at the start, and its own gradient is not zero."""
    blocks, own, query, gradients = random(True)
    attended = functools.partial(attend_depth, count=jnp.int32(BLOCKS), implementation=implementation)
    (read, _), pull_back = jax.vjp(attended, blocks, own, jnp.zeros_like(query))
    np.testing.assert_allclose(read, blocks.sum(0) + own, rtol=1e-5, atol=1e-5)
    assert np.abs(pull_back(tuple(gradients))[2]).max() > 0.1


@OWN
def test_bfloat16_is_rounded_once(with_own):
    """What is read and the gradients are those of float32, rounded; rows are shared out among programs as they may."""
    blocks, own, query, gradients = random(with_own, jnp.bfloat16)

    def both(blocks, own, **options):
        (read, _), pull_back = jax.vjp(
            lambda blocks, own, query: attend_depth(blocks, own, query, jnp.int32(3), **options), blocks, own, query
        )
        return jax.tree.leaves((read, pull_back(tuple(g.astype(blocks.dtype) for g in gradients))))

    wide = [None if array is None else array.astype(jnp.float32) for array in (blocks, own)]
    expected = both(*wide, implementation="plain")
    for launch in (RowLaunch(rows=2, warps=4), RowLaunch(rows=8, warps=2)):
        found = both(blocks, own, implementation="fused", launches=Launches(launch, launch))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=1e-5 * np.abs(other).max())


def test_sizes_that_no_kernel_takes():
    blocks, own, query, _ = random(True, width=24)  # parts of 8
    with pytest.raises(ValueError, match="no fused kernel for 16 rows of 24"):
        attend_depth(blocks, own, query, jnp.int32(1), "fused")
    attend_depth(blocks, own, query, jnp.int32(1))


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model.trunk.depth_block": 0}, ["--model.trunk.depth-block is 0", "at least 1"]),
        ({"model.trunk.depth_block": 3}, ["--model.trunk.depth-block 3", "the 8 layers of --model.layers.loop"]),
        (
            {"model.trunk.depth_block": 2, "model.layers": LayerSchedule(4, 0, 1, 4)},
            ["--model.trunk.depth-block 2 needs a loop", "leave it out"],
        ),
    ],
)
def test_blocks_that_cannot_be_are_refused_in_one_line(changes, fragments):
    with pytest.raises(UserError) as caught:
        check_config(changed(preset("wide-recurrent"), changes))
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.gpu
@OWN
def test_the_compiled_kernels_are_the_plain_functions(with_own):
    """At the candidate's width, over eight blocks of which six are complete."""
    keys = jax.random.split(jax.random.key(3), 5)
    blocks = jax.random.normal(keys[0], (8, 2, 256, 896), jnp.bfloat16)
    own = jax.random.normal(keys[1], blocks.shape[1:], jnp.bfloat16) if with_own else None
    query = jax.random.normal(keys[2], (896,))
    gradients = tuple(jax.random.normal(key, x.shape, jnp.bfloat16) for key, x in zip(keys[3:], (blocks[0], blocks)))
    results = {}
    for implementation in ("plain", "fused"):
        attended = functools.partial(attend_depth, count=jnp.int32(6), implementation=implementation)
        (read, _), pull_back = jax.vjp(attended, blocks, own, query)
        results[implementation] = jax.tree.leaves((read, pull_back(gradients)))
    for one, other in zip(*results.values(), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
        assert np.linalg.norm(one - other) < 5e-3 * np.linalg.norm(other)
