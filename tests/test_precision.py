"""With bfloat16 activations, what is summed over tokens is summed in float32: a bfloat16 sum stands still at 256 times
what is added to it."""

import jax
import jax.numpy as jnp
import pytest
from tiny import random_sequences, tiny_gpt2, tiny_model

from senano_jax.model.build import abstract_params

SUMS = {"reduce_sum", "scatter-add", "cumsum"}


def equations(jaxpr):
    """Those of `jaxpr` and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    "make", [tiny_gpt2, tiny_model, lambda dtype: tiny_model(dtype, value_embeddings=1)], ids=["gpt2", "gpt", "values"]
)
def test_no_sum_over_tokens_is_bfloat16(make):
    model = make("bfloat16")
    tokens = jnp.asarray(random_sequences(2, 256, vocabulary=500))
    params = abstract_params(model)

    def loss(params):
        return model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    sums = [equation for equation in equations(jaxpr) if equation.primitive.name in SUMS]
    assert len(sums) > 10
    coarse = [
        equation
        for equation in sums
        if equation.outvars[0].aval.dtype == jnp.bfloat16 and equation.invars[-1].aval.size >= tokens.size
    ]
    assert not coarse, [(e.primitive.name, e.invars[-1].aval, e.outvars[0].aval, e.source_info) for e in coarse]
