"""The second half of a layer with weights of the stream: on a CPU the fused backward pass runs interpreted, the same
code as on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tiny import random_params, tiny_model

from senano_jax.kernels.triton import RowLaunch
from senano_jax.model.schedule import LayerSchedule, Weighted
from senano_jax.model.stream_mlp import DEFAULT_LAUNCH, StreamWeights, backward, stream_mlp
from senano_jax.profiling.hlo import RESIDUAL, module_of, pass_of, read_instructions

NAMES = ("x", "x0", "added", "weights", "up", "down")


def operands(width, dtype=jnp.float32, *, has_added=True, length=8):
    """All that stream_mlp takes, and a gradient of what comes out."""
    keys = iter(jax.random.split(jax.random.key(width), 6))
    x, x0, added, gradient = (3 * jax.random.normal(next(keys), (2, length, width), dtype) for _ in range(4))
    up, down = (jax.random.normal(next(keys), shape, dtype) / width**0.5 for shape in ((width, 64), (64, width)))
    weights = StreamWeights(*map(jnp.float32, (0.9, -0.3, 1.2)))
    return (x, x0, added if has_added else None, weights, up, down), gradient.astype(jnp.float32)


def by_hand(x, x0, added, weights, up, down):
    """In float64."""
    total = weights[0] * x + weights[1] * x0 + (0 if added is None else added)
    normed = total / np.sqrt(np.mean(total**2, -1, keepdims=True) + 1.1920929e-7)
    return weights[2] * total + np.maximum(normed @ up, 0) ** 2 @ down


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("has_added", [True, False])
def test_what_comes_out(implementation, has_added):
    inputs, _ = operands(48, has_added=has_added)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs)
    np.testing.assert_allclose(stream_mlp(*inputs, implementation), by_hand(*exact), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [32, 96, 768])  # one part, three narrow ones, three wide ones
@pytest.mark.parametrize("has_added", [True, False])
def test_gradients(width, has_added):
    """Of everything that goes in, against those of plain operations."""
    inputs, gradient = operands(width, has_added=has_added)
    _, expected = jax.vjp(lambda *inputs: stream_mlp(*inputs, "plain"), *inputs)
    for launch in (RowLaunch(rows=4, warps=4), RowLaunch(rows=2, warps=1)):
        _, found = jax.vjp(lambda *inputs, launch=launch: stream_mlp(*inputs, "fused", launch=launch), *inputs)
        for name, ours, theirs in zip(NAMES, found(gradient), expected(gradient), strict=True):
            jax.tree.map(
                lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name),
                ours,
                theirs,
            )


def test_bfloat16_rounds_gradients_once():
    """Those of x and of what is added are the nearest bfloat16 numbers to the exact ones."""
    inputs, gradient = operands(96, jnp.bfloat16)
    gradient = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    inputs = (*inputs[:5], jnp.zeros((64, 96), jnp.bfloat16))  # nothing of the MLP, whose own products round
    out, pull_back = jax.vjp(lambda *inputs: stream_mlp(*inputs, "fused"), *inputs)
    d_x, _, d_added, d_weights, *_ = pull_back(gradient)
    assert out.dtype == jnp.float32 and d_x.dtype == d_added.dtype == jnp.bfloat16
    weights = inputs[3]
    np.testing.assert_allclose(d_added.astype(jnp.float32), weights.sum * gradient, rtol=2**-8)
    np.testing.assert_allclose(d_x.astype(jnp.float32), weights.x * weights.sum * gradient, rtol=2**-8)
    np.testing.assert_allclose(d_weights.x, jnp.sum(weights.sum * gradient * inputs[0]), rtol=1e-4)


def test_gradients_of_rematerialised_layers_in_a_loop_over_two_devices():
    """As the model uses it."""
    inputs, _ = operands(32)
    added = jnp.stack([inputs[2], inputs[0], inputs[1]])

    def loss(x, x0, added, weights, up, down, implementation):
        def layer(x, added):
            return stream_mlp(x, x0, added, weights, up, down, implementation), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, added)[0] ** 2)

    def gradients(*operands, implementation):
        of_rows, of_weights = jax.grad(lambda rows, weights: loss(*rows, *weights, implementation), argnums=(0, 1))(
            operands[:3], operands[3:]
        )
        return of_rows, jax.lax.psum(of_weights, "d")

    rows, added_rows, same = PartitionSpec("d"), PartitionSpec(None, "d"), PartitionSpec()
    specs = (rows, rows, added_rows)
    found, expected = (
        jax.jit(
            jax.shard_map(
                functools.partial(gradients, implementation=implementation),
                mesh=Mesh(np.array(jax.devices()[:2]), "d"),
                in_specs=(*specs, same, same, same),
                out_specs=(specs, same),
                check_vma=False,
            )
        )(inputs[0], inputs[1], added, *inputs[3:])
        for implementation in ("fused", "plain")
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("length", "width"), [(8, 24), (3, 32)])  # parts of 8; 6 rows for programs of 4
def test_fused_refuses_what_it_cannot_do(length, width):
    inputs, _ = operands(width, length=length)
    with pytest.raises(ValueError, match=f"no fused kernel for {2 * length} rows of {width}"):
        stream_mlp(*inputs, "fused", launch=RowLaunch(rows=4, warps=4))


def test_a_loop_stores_what_it_needs_once(capsys):
    """Of each visit x, what is added to it, and the norm; not the embedding, which is the same for all."""
    inputs, _ = operands(32)
    x, x0, added, weights, up, down = inputs
    visits = 3

    def loss(x, x0, added, weights, up, down):
        def visit(x, added):
            return stream_mlp(x, x0, added, weights, up, down, "fused"), None

        return jnp.sum(jax.lax.scan(visit, x, added)[0])

    jax.ad_checkpoint.print_saved_residuals(loss, x, x0, jnp.stack([added] * visits), weights, up, down)
    assert capsys.readouterr().out.count(f"f32[{visits},2,8,32]") == 3


@pytest.mark.parametrize("fused", [True, False])
def test_profiles_tell_the_mlp_from_the_norm_before_it(fused, monkeypatch):
    monkeypatch.setattr("senano_jax.model.stream_mlp.takes_fused", lambda *_: fused)
    model = tiny_model(layers=LayerSchedule(1, 0, 1, 1, no_attention=(1,)), trunk=Weighted())
    tokens = jnp.zeros((1, 128), jnp.int32)

    def total(params):
        return jnp.sum(model.apply({"params": params}, tokens, 1, method="features"))

    program = jax.jit(jax.grad(total)).lower(random_params(model)).compile().as_text()
    paths = [i.op_name for i in read_instructions(program).values() if "layer_1" in i.op_name]

    def modules(part):
        return {(module_of(path), pass_of(path)) for path in paths if part in path.split("/")}

    assert modules("dot_general") == {("mlp", "forward"), ("mlp", "backward")}
    assert modules("rsqrt") == {(RESIDUAL, "forward"), (RESIDUAL, "backward")} if fused else {(RESIDUAL, "forward")}
    assert modules("mlp.matrices") == modules("dot_general")


@pytest.mark.parametrize("has_added", [True, False])
def test_lowers_for_cuda(has_added):
    """The kernel passes through Pallas into Triton's language; no GPU takes part."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("from 0.11 Pallas asks a real device for its architecture")
    rows = jax.ShapeDtypeStruct((1, 32_768, 768), jnp.bfloat16)
    weights = StreamWeights(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
    operands = (rows, rows, rows if has_added else None, weights, rows, rows)
    lowered = backward.trace(*operands, launch=DEFAULT_LAUNCH, interpret=False).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("has_added", [True, False])
def test_gradients_on_a_gpu(has_added):
    inputs, gradient = operands(768, jnp.bfloat16, has_added=has_added, length=4096)

    def gradients(implementation, *inputs):
        return jax.vjp(lambda *inputs: stream_mlp(*inputs, implementation), *inputs)[1](gradient)

    found, expected = (jax.jit(gradients, static_argnums=0)(name, *inputs) for name in ("fused", "plain"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
