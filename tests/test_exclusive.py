"""Attention without a share along the token's own value: the original's numbers, and the formula by visit."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_alone import check_by_formula, tokens_with_documents
from pieces_reference import largest_error, reference
from tiny import tiny_model

from senano_jax.attention import Intervals
from senano_jax.attention.dense import dense_attention
from senano_jax.config import LayerSchedule
from senano_jax.model.elementwise import norm
from senano_jax.model.pieces.exclusive import Exclusive
from senano_jax.model.rotary import rotary_tables, rotate

LENGTH, HEADS, WIDTH = 48, 4, 16
SECOND_DOCUMENT, BACK = 20, 20  # where it starts; keys before its own that a query sees
PAIRS_APART = np.r_[0:WIDTH:2, 1:WIDTH:2]  # the original's rotary pairs are neighbours
VISITS, VISIT = 3, 2


def test_it_is_the_original_function():
    """The whole attention, with an addition to its values, and gradients of what goes in; there each token has
    strengths of its own. The other visits' strengths have no gradient."""
    inputs, arrays = reference("b_attn")
    x, lam, aux, gy = (jnp.asarray(inputs[name]) for name in ("x", "lam", "aux", "gy"))
    q_w, k_w, v_w, out_w = (jnp.asarray(w.T) for w in np.split(inputs["W"], 4))
    position = np.arange(LENGTH)
    key_start = np.maximum(np.where(position < SECOND_DOCUMENT, 0, SECOND_DOCUMENT), position - BACK)
    intervals = Intervals(jnp.asarray(key_start)[None], None)
    module = Exclusive(VISITS, HEADS)

    def exclusive(y_HK, v_HK, strength):
        return module.apply({"params": {"strength": strength}}, y_HK, v_HK, None, VISIT, method=module.after)

    @jax.jit
    def attended(x, aux, strengths):
        q, k, v = (lam[0] * (x @ w).reshape(1, LENGTH, HEADS, WIDTH) for w in (q_w, k_w, v_w))
        v = v + aux.reshape(v.shape)
        q, k = (rotate(norm(z[..., PAIRS_APART]), rotary_tables(LENGTH, WIDTH)) for z in (q, k))
        y = dense_attention(q, k, v, intervals, 0.1)
        y = jax.vmap(exclusive)(y[0], v[0], strengths)
        return lam[1] * y.reshape(x.shape) @ out_w

    strengths = 9 * jnp.ones((LENGTH, VISITS, HEADS)).at[:, VISIT].set(inputs["xsa"] / 9)
    value, pull_back = jax.vjp(attended, x, aux, strengths)
    d_x, d_aux, d_strengths = pull_back(gy)
    assert largest_error(value, arrays["y_xsa"]) < 2e-6
    assert largest_error(d_x, arrays["d_x_xsa"]) < 1e-5
    assert largest_error(d_aux, arrays["d_aux_xsa"]) < 1e-5
    assert largest_error(d_strengths[:, VISIT], arrays["d_xsa_xsa"]) < 1e-5
    np.testing.assert_array_equal(np.delete(d_strengths, VISIT, axis=1), 0)


def test_it_comes_before_the_gate_and_has_strengths_by_visit():
    """In a layer of the loop, whose attention is that of the formula."""
    config = tiny_model(exclusive_attention=True, head_gate=True, layers=LayerSchedule(1, 2, 2, 1)).config
    check_by_formula(config, 1, tokens_with_documents(100), visit=1)


def test_it_changes_nothing_at_the_start_and_bears_values_of_zero():
    """In bfloat16, whose type it keeps; at a value of zero the gradient is finite."""
    y, v = jnp.ones((1, 4, 2, 8), jnp.bfloat16) / 3, jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    params = Exclusive(1, 2).init(jax.random.key(0), y, v, None, 0, method=Exclusive.after)["params"]
    assert params["strength"].shape == (1, 2) and params["strength"].dtype == jnp.float32

    def after(v, strength):
        return Exclusive(1, 2).apply({"params": {"strength": strength}}, y, v, None, 0, method=Exclusive.after)

    left = after(jnp.ones_like(v), params["strength"])
    assert left.dtype == jnp.bfloat16
    np.testing.assert_array_equal(left, y)
    slopes = jax.grad(lambda v: after(v, jnp.ones((1, 2))).astype(jnp.float32).sum())(v)
    np.testing.assert_array_equal(slopes, 0)
