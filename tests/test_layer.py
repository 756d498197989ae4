"""One layer by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from senano_jax.attention import document_start, window_intervals
from senano_jax.model.context import Context
from senano_jax.model.rotary import rotary_tables
from senano_jax.model.trunks.unet import UNetLayer


@pytest.mark.parametrize("by", ["attention", "mlp"])
def test_what_a_layer_adds_to_a_large_stream_is_not_lost(by):
    """bfloat16 numbers near 256 are 2 apart, and what is added is less; its sum with the stream is float32."""
    length = 128
    layer = UNetLayer(TINY, layer=0)
    x = jnp.full((1, length, TINY.dim), 256, jnp.bfloat16)
    x0 = jax.random.normal(jax.random.key(0), x.shape).astype(jnp.bfloat16)
    tokens = jnp.ones((1, length), jnp.int32)
    starts = document_start(tokens)
    windows = {True: window_intervals(starts, 1)}
    given = (x, None, Context(x0, None, (), rotary_tables(length, TINY.head_dim), windows))
    params = layer.init(jax.random.key(1), *given)["params"]
    last = "out" if by == "attention" else "down"
    matrix = 0.1 * jax.random.normal(jax.random.key(2), params[by][last].shape)
    out, _ = layer.apply({"params": {**params, by: {**params[by], last: matrix}}}, *given)

    ones = jnp.ones(TINY.dim)  # the norm of a constant stream; all tokens have the same values
    hidden = (
        ones @ params["attention"]["qkv"][2] if by == "attention" else np.maximum(ones @ params["mlp"]["up"], 0) ** 2
    )
    added = hidden @ matrix
    assert out.dtype == jnp.float32
    assert 0.01 < np.abs(added).max() < 1
    np.testing.assert_allclose(out[0, 0] - 256, added, rtol=0, atol=0.02 * np.abs(added).max())
