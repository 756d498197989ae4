"""Attention of a product, whose gradient goes back to the product in attention's own kernels for Hopper GPUs:
interpreted, lowered for a GPU, and on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mosaic_interpreter import interpreted, needs_interpreter
from test_flash import SCALE, random_tokens
from test_heads import relative_errors
from test_hopper_flash import lowered, needs_lowering, on_hopper

from senano_jax.attention import Intervals, document_start, window_intervals
from senano_jax.model.heads_attention import attend_heads
from senano_jax.model.rotary import rotary_tables

NAMES = ("out", "v", "d_qkv", "d_first_v", "d_value_residual")
FEELS = "d_first_v", "d_value_residual"


def random_inputs(seed, batch, length, heads, width, *, mixed, read_again):
    """qkv, first_v or None, value_residual, and gradients of the output and, if they are read again, of the values."""
    rng = np.random.default_rng(seed)
    of_heads = (batch, length, heads, width)
    qkv, *others = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((batch, length, 3 * heads * width), of_heads, of_heads, of_heads)
    )
    first_v, dout, other_dv = others
    return qkv, first_v if mixed else None, jnp.float32(0.3), dout, other_dv if read_again else None


def random_intervals(seed, batch, length, documents, window_blocks):
    tokens = random_tokens(np.random.default_rng(seed), batch, length, documents)
    return window_intervals(document_start(tokens), window_blocks)


def value_and_gradients(qkv, first_v, value_residual, dout, other_dv, intervals, implementation, **options):
    """By name: the output, the values and the gradients of what these were made of."""
    _, length, heads, width = dout.shape

    def run(qkv, first_v, value_residual):
        out, v = attend_heads(
            qkv, first_v, value_residual, rotary_tables(length, width), intervals, heads, SCALE, implementation,
            **options,
        )  # fmt: skip
        return (out, v) if other_dv is not None else (out, jax.lax.stop_gradient(v))

    out, pullback = jax.vjp(run, qkv, first_v, value_residual)
    gradients = pullback((dout, jnp.zeros_like(dout) if other_dv is None else other_dv))
    results = {name: x for name, x in zip(NAMES, (*out, *gradients)) if x is not None}
    return {name: x for name, x in results.items() if first_v is not None or name not in FEELS}


def exact(inputs):
    return jax.tree.map(lambda x: x.astype(jnp.float32), inputs)


@pytest.fixture
def hopper(monkeypatch):
    """Value and gradients with the kernels for Hopper GPUs, interpreted."""
    monkeypatch.setattr("senano_jax.attention.hopper_flash.runs_here", lambda: True)

    def run(*arguments, detect_races=False, **options):
        with interpreted(monkeypatch, detect_races=detect_races):
            return jax.block_until_ready(value_and_gradients(*arguments, "hopper", **options))

    return run


@needs_interpreter
@pytest.mark.parametrize("offsets_keys", [False, True], ids=["", "offset keys"])
@pytest.mark.parametrize("read_again", [False, True], ids=["", "values read again"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed values"])
def test_agrees_with_the_plain_path(hopper, mixed, read_again, offsets_keys):
    """In float32 and dense, from which bfloat16 differs by its roundings."""
    inputs = random_inputs(1, 1, 256, 2, 64, mixed=mixed, read_again=read_again)
    intervals = random_intervals(2, 1, 256, 0.01, 2)
    results = hopper(*inputs, intervals, offsets_keys=offsets_keys)
    references = value_and_gradients(*exact(inputs), intervals, "dense", offsets_keys=offsets_keys)
    errors = relative_errors(results, references)
    assert errors.pop("d_value_residual", 0) < 1e-2
    assert max(errors.values()) < 5e-3, errors
    assert results["d_qkv"].dtype == jnp.bfloat16
