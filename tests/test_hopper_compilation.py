"""Which kernels of a program are compiled beside it, and that each is compiled as the program has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from senano_jax.kernels.hopper_compilation import compile_kernels_beside, kernels_of, program
from senano_jax.kernels.hopper_matmul import matmul


def call(x, name, target="mosaic_gpu_v2"):
    """A call of a made-up kernel; nothing on a CPU can compile it."""
    return jax.ffi.ffi_call(target, x)(
        x, kernel_hash=name.encode() + b"\xff", module=b"\x00\xfe", use_custom_barrier=False
    )


def names(lowered):
    return [kernel.attributes["kernel_hash"].removesuffix(b"\xff").decode() for kernel in kernels_of(lowered)]


def test_finds_each_kernel_once_however_deep():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))

    def turn(x, _):
        return call(x, "loop"), None

    def local(x):
        x, _ = jax.lax.scan(turn, call(x, "first"), length=3)
        return call(jax.jit(call, static_argnums=1)(x, "jit"), "first")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    assert names(jax.jit(sharded).lower(jnp.zeros(4))) == ["first", "loop", "jit"]


def test_leaves_other_calls_alone():
    """Whatever attributes these have."""

    def program(x):
        other = jax.ffi.ffi_call("some_kernel", x)(call(x, "other", "some_other"), sizes=np.arange(3), kernel_hash="a")
        return call(other, "ours")

    assert names(jax.jit(program).lower(jnp.zeros(4))) == ["ours"]


def test_starts_nothing_without_kernels():
    assert compile_kernels_beside(jax.jit(jnp.sin).lower(1.0)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "int32", "uint8", "uint16", "bool"])
def test_compiles_the_kernel_that_the_program_calls(dtype):
    x = jax.ShapeDtypeStruct((2, 3), dtype)
    [kernel] = kernels_of(jax.jit(lambda x: call(x, "same")).lower(x))
    assert kernel.operands == kernel.results == (x,)
    assert kernel.attributes == {"kernel_hash": b"same\xff", "module": b"\x00\xfe", "use_custom_barrier": False}
    assert kernels_of(program(kernel)) == [kernel]


def test_an_error_stays_in_its_thread():
    futures = compile_kernels_beside(jax.jit(lambda x: call(call(x, "a"), "b")).lower(jnp.zeros(4)))
    assert [type(future.exception(timeout=60)) for future in futures] == [jax.errors.JaxRuntimeError] * 2


def test_compiles_no_kernel_twice():
    lowered = [jax.jit(lambda x, last=last: call(call(x, "c"), last)).lower(jnp.zeros(4)) for last in ("d", "e", "d")]
    assert [len(compile_kernels_beside(each)) for each in lowered] == [2, 1, 0]


@pytest.mark.gpu
def test_compiles_every_kernel_on_a_gpu():
    a, b = jax.random.normal(jax.random.key(0), (256, 192), jnp.bfloat16), jnp.eye(192, dtype=jnp.bfloat16)
    lowered = jax.jit(lambda a, b: matmul(matmul(a, b, jnp.negative), b, jnp.abs)).lower(a, b)
    futures = compile_kernels_beside(lowered)
    assert [future.exception() for future in futures] == [None, None]
    np.testing.assert_array_equal(lowered.compile()(a, b), jnp.abs(a))
