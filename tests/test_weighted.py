"""One layer of the trunk whose weights differ between applications, against the original function."""

import jax
import jax.numpy as jnp
import pytest
from pieces_reference import largest_error, reference
from tiny import TINY

from senano_jax.config import changed
from senano_jax.model.context import Context
from senano_jax.model.schedule import Weighted
from senano_jax.model.trunks.weighted import WeightedLayer, Weights


class Tanh(WeightedLayer):
    """With tanh(z A) in place of attention, as in the reference."""

    matrix: jax.Array | None = None

    def attend(self, x_BTD, context, visit, weight):
        return (weight * jnp.tanh(x_BTD @ self.matrix)).astype(x_BTD.dtype), None


def test_a_layer_is_the_original_one():
    """x <- r_a x + p_a attention + l x0; x <- r_m x + p_m mlp: output and gradients of everything that goes in."""
    inputs, arrays = reference("c_residual")
    names = ("x", "x0", "A", "M1", "M2", "resid_attn", "post_attn", "resid_mlp", "post_mlp", "x0_lambda")
    given = [jnp.asarray(inputs[name]) for name in names]
    config = changed(TINY, {"trunk": Weighted(), "mlp_expansion": 2})

    def layer(x, x0, A, M1, M2, resid_attn, post_attn, resid_mlp, post_mlp, x0_lambda):
        weights = Weights(
            jnp.concatenate([resid_attn, resid_mlp]), jnp.concatenate([post_attn, post_mlp]), x0_lambda[0]
        )
        context = Context(x0[None], None, (), None, {})
        variables = {"params": {"mlp": {"up": M1, "down": M2}}}
        return Tanh(config, 0, matrix=A).apply(variables, x[None], weights, context, 0)[0][0]

    value, pull_back = jax.vjp(layer, *given)
    assert largest_error(value, arrays["y_block"]) < 3e-6
    for name, gradient in zip(names, pull_back(jnp.asarray(inputs["gy"])), strict=True):
        assert largest_error(gradient, arrays[f"d_{name}_block"]) < 2e-5, name


@pytest.mark.parametrize("by", ["attention", "mlp"])
def test_what_a_sublayer_adds_to_a_large_stream_is_not_lost(by):
    """bfloat16 numbers near 256 are 2 apart, and what is added is less; its sum with the stream is float32."""
    config = changed(TINY, {"trunk": Weighted()})
    x = jnp.full((1, 128, TINY.dim), 256, jnp.bfloat16)
    context = Context(jnp.zeros_like(x), None, (), None, {})
    matrix = 0.01 * jax.random.normal(jax.random.key(0), (TINY.dim, TINY.dim)).astype(jnp.bfloat16)
    layer = Tanh(config, 0, matrix=matrix if by == "attention" else jnp.zeros_like(matrix))
    weights = Weights(jnp.ones(2), jnp.ones(2), jnp.float32(0))
    params = layer.init(jax.random.key(1), x, weights, context, 0)["params"]
    if by == "mlp":
        params["mlp"]["down"] = 0.01 * jax.random.normal(jax.random.key(2), params["mlp"]["down"].shape)
    out, _ = layer.apply({"params": params}, x, weights, context, 0)
    ones = jnp.ones(TINY.dim)
    added = jnp.tanh(ones @ matrix) if by == "attention" else jnp.maximum(ones @ params["mlp"]["up"], 0) ** 2
    added = added if by == "attention" else added @ params["mlp"]["down"]
    assert out.dtype == jnp.float32
    assert 0.01 < jnp.abs(added).max() < 1
    assert jnp.abs(out[0, 0] - 256 - added).max() < 0.02 * jnp.abs(added).max()
