"""The gate on attention's heads, by itself; in a model: test_variants.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces_reference import largest_error, reference

from senano_jax.model.pieces.head_gate import HeadGate

VISITS = 3


@pytest.mark.parametrize("visit", [0, 2])
def test_it_is_the_original_function(visit):
    """Value and gradients of output, input and gate, at the visit whose gate it is; the other visits' gates have no
    gradient. The number of the visit may be traced."""
    inputs, arrays = reference("b_gates")
    y, x, g = (jnp.asarray(inputs[name])[None] for name in ("y", "xn", "c"))
    gates = 9 * jnp.ones((VISITS, 2, 12)).at[visit].set(inputs["G"] / 9)
    module = HeadGate(VISITS, 2)

    @jax.jit
    def gated(y, x, gates, visit):
        return module.apply({"params": {"gate": gates}}, y, y, x, visit, method=module.after)

    value, pull_back = jax.vjp(lambda *a: gated(*a, visit), y, x, gates)
    d_y, d_x, d_gates = pull_back(g)
    assert largest_error(value[0], arrays["attn_gate_out"]) < 3e-6
    assert largest_error(d_y[0], arrays["d_y_attn"]) < 1e-5
    assert largest_error(d_x[0], arrays["d_xn_attn"]) < 1e-5
    assert largest_error(d_gates[visit], arrays["d_G_attn"]) < 1e-5
    np.testing.assert_array_equal(np.delete(d_gates, visit, axis=0), 0)


def test_it_halves_what_a_fresh_layer_gives_and_keeps_its_type():
    y, x = jnp.ones((1, 4, 2, 8), jnp.bfloat16), jnp.ones((1, 4, 16), jnp.bfloat16)
    params = HeadGate(1, 2).init(jax.random.key(0), y, y, x, 0, method=HeadGate.after)["params"]
    assert params["gate"].shape == (1, 2, 12) and params["gate"].dtype == jnp.float32
    gated = HeadGate(1, 2).apply({"params": params}, y, y, x, 0, method=HeadGate.after)
    assert gated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gated, 0.5)
