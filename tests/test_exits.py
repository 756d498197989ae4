"""Sums of earlier residual streams by weights that tokens compute; in a model: test_variants.py."""

import jax.numpy as jnp
import numpy as np
from pieces_reference import largest_error, reference

from senano_jax.model.trunks.exits import Exits


def test_it_is_the_original_function():
    """What the last layer's stream is given before the head, by the second of two generators."""
    inputs, arrays = reference("c_mudd")
    params = {"inner": inputs["W1"][1].T, "outer": inputs["W2"][1, :5].T, "offset": inputs["b"][1, :5]}
    sources = [jnp.asarray(inputs[name])[None] for name in ("c0", "c7", "c9", "ve", "c3")]
    x = jnp.asarray(arrays["x_after_mlp"])[None]
    out = Exits((0.0,) * 5).apply({"params": params}, x, sources)
    assert largest_error(out[0], arrays["x_before_norm"]) < 4e-6
    fewer = Exits((0.0,) * 5).apply({"params": params}, x, sources[:2])
    expected = x[0] + arrays["mu_head"][:, :1] * inputs["c0"] + arrays["mu_head"][:, 1:2] * inputs["c7"]
    assert largest_error(fewer[0], np.asarray(expected)) < 4e-6


def test_a_large_stream_keeps_what_is_added():
    """bfloat16 numbers near 256 are 2 apart; the sum is float32."""
    x = jnp.full((1, 4, 32), 256, jnp.bfloat16)
    module = Exits((0.01,))
    out = module.apply(
        {"params": {"inner": jnp.zeros((32, 64)), "outer": jnp.zeros((64, 1)), "offset": jnp.full(1, 0.1)}},
        x,
        [x[:, :, :] / 256],
    )
    np.testing.assert_allclose(out, 256.01, rtol=1e-6)
