"""Products whose sums are added up in parts: the parts, their sum, and where the loss takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_rows import HALF_ULP
from oracles import relative_error

from senano_jax.model import long_sum
from senano_jax.model import loss as loss_module
from senano_jax.model.long_sum import MOST_TERMS, parts_of, rows_product
from senano_jax.model.loss import cross_entropy
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import targets_of


@pytest.mark.parametrize(
    ("terms", "parts"),
    [(768, 1), (MOST_TERMS, 1), (50_304, 12), (2 * MOST_TERMS, 2), (50_257, 1), (8 * 10_007, 1)],
)
def test_the_parts_are_equal_short_and_begin_at_whole_rows_of_16_bytes(terms, parts):
    assert parts_of(terms) == parts
    if parts > 1:
        assert terms % parts == 0 and terms // parts <= MOST_TERMS and terms // parts % 8 == 0


def test_fewer_parts_would_not_do():
    for terms in range(8, 60_000, 808):
        enough = [n for n in range(1, 40) if terms / n <= MOST_TERMS]
        fitting = [n for n in enough if terms % (8 * n) == 0 and n < 2 * enough[0]]
        assert parts_of(terms) == min(fitting, default=1)


def operands(rows: int, terms: int, columns: int, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((count, terms)), dtype) for count in (rows, columns)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, HALF_ULP)])
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_the_sum_of_the_parts(dtype, tolerance, parts):
    """That of float64, rounded once."""
    a, b = operands(24, 480, 16, dtype)
    result = rows_product(a, b, parts)
    assert result.dtype == dtype
    assert relative_error(result, np.asarray(a, np.float64) @ np.asarray(b, np.float64).T) < tolerance


@pytest.mark.parametrize(("gpu", "dtype", "expected"), [(True, jnp.bfloat16, [3]), (True, jnp.float32, []),
                                                        (False, jnp.bfloat16, [])])  # fmt: skip
def test_the_loss_takes_parts_where_sums_are_long_and_a_tensor_core_adds_them_up(gpu, dtype, expected, monkeypatch):
    """And its gradient is that of the whole sum but for roundings. The kernel of the loss, which a GPU would take, is
    left out."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 64, 32)), dtype)
    head = jnp.asarray(rng.standard_normal((32, 480)), jnp.float32)
    targets = targets_of(jnp.asarray(rng.integers(0, 480, (2, 64)), jnp.int32), None)
    gradient = jax.grad(functools.partial(cross_entropy, chunk_tokens=128), argnums=0)
    whole = gradient(x, head, targets, SoftCap())
    taken = []
    monkeypatch.setattr(loss_module, "_is_fused", lambda *sizes: False)
    monkeypatch.setattr(loss_module, "on_gpu", lambda: gpu)
    monkeypatch.setattr(long_sum, "MOST_TERMS", 160)
    monkeypatch.setattr(
        long_sum, "rows_product", lambda a, b, parts: (taken.append(parts), rows_product(a, b, parts))[1]
    )
    in_parts = gradient(x, head, targets, SoftCap())
    assert taken == expected
    assert relative_error(in_parts, np.asarray(whole, np.float64)) < (2 * HALF_ULP if expected else 1e-7)


@pytest.mark.gpu
def test_small_terms_are_not_lost_on_a_gpu():
    """One large term and 50,303 small ones for each row, as in the gradient of the loss. The roundings of the rows'
    results cancel in the mean over all rows; what a tensor core cuts off does not."""
    rows, terms, columns = 8192, 50_304, 768
    keys = jax.random.split(jax.random.key(0), 4)
    frequencies = -jnp.log(1.0 + jnp.arange(terms))
    dz = jax.nn.softmax(frequencies + 1.5 * jax.random.normal(keys[0], (rows, terms)), axis=-1)
    large = jax.random.categorical(keys[1], jnp.broadcast_to(frequencies, (rows, terms)))
    dz = dz.at[jnp.arange(rows), large].add(-1.0).astype(jnp.bfloat16)
    head = jax.random.normal(keys[2], (columns, terms)) + jax.random.normal(keys[3], (columns, 1))
    head = (0.5 * head).astype(jnp.bfloat16)
    mean = np.asarray(dz, np.float64).mean(0) @ np.asarray(head, np.float64).T
    error = {
        parts: relative_error(np.asarray(rows_product(dz, head, parts), np.float64).mean(0), mean)
        for parts in (1, parts_of(terms))
    }
    assert error[parts_of(terms)] < error[1] / 3
