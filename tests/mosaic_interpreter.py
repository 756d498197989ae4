"""JAX's interpreter of Mosaic GPU kernels, with what it lacks: products whose left factor is in registers, and stores
into their accumulators. Kernels for Triton keep the interpreter of their own.

Barriers, copies and the threads of a block are simulated: a wait without a signal hangs, a signal that none waited for
is an error. Products are done at once, where a GPU does them later: what must not be overwritten before they are
done is not checked.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from senano_jax.kernels import triton

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu",
    reason="JAX 0.10 interprets no products of the tensor cores, and a GPU runs the kernels themselves",
)


@contextlib.contextmanager
def interpreted(monkeypatch, **options):
    """Kernels traced in this context run on the CPU; `options` are those of InterpretGPUParams."""
    _complete_interpreter(monkeypatch)
    monkeypatch.setattr(triton, "call", functools.partial(_outside, triton.call))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
        yield


def _outside(call, *args, **options):
    """The kernel of `call`, which may be called in `interpreted`, as it is without that."""

    def run(*operands):
        with plgpu.force_gpu_interpret_mode(None):
            return call(*args, **options)(*operands)

    return run


def _complete_interpreter(monkeypatch):
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
    from jax._src.state import AbstractRef

    interpreter = jaxpr_interpret.JaxprInterpreter
    interpret, interpret_product = interpreter.interpret, interpreter._interpret_wgmma_ref_p

    def as_product(eqn):
        """A store into an accumulator in the place of a product, which the interpreter passes on to us."""
        if eqn.primitive is not primitives.wgmma_accumulator_store_p:
            return eqn
        return eqn.replace(primitive=primitives.wgmma_ref_p, outvars=[], params={"store": True}, effects=set())

    def interpret_with_stores(self, jaxpr, token, *args):
        return interpret(self, jaxpr.replace(eqns=[as_product(eqn) for eqn in jaxpr.eqns]), token, *args)

    def interpret_any_product(self, eqn, token, get_invals):
        if "store" in eqn.params:
            callback, operands = _store_accumulator, dict(zip(("acc", "value"), get_invals()))
        elif not isinstance(eqn.invars[1].aval, AbstractRef):
            assert eqn.params["acc_transforms_tree"] is None and eqn.params["a_transforms_tree"] is None
            acc, a, b, *leaves = get_invals()
            b_transforms = jax.tree.unflatten(eqn.params["b_transforms_tree"], leaves)
            callback, operands = _multiply_registers, {"acc": acc, "a": a, "b": b, "b_transforms": b_transforms}
        else:
            return interpret_product(self, eqn, token, get_invals)
        return jaxpr_interpret.callback.io_callback(
            functools.partial(callback, source_info=eqn.source_info),
            jaxpr_interpret.gpu_callbacks.TOKEN_SHAPE_DTYPE,
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            **operands,
        ), []

    monkeypatch.setattr(interpreter, "interpret", interpret_with_stores)
    monkeypatch.setattr(interpreter, "_interpret_wgmma_ref_p", interpret_any_product)


def _multiply_registers(*, token, mesh_location, thread, acc, a, b, b_transforms, source_info):
    """acc += a b, in which a is an array."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    memory = gpu_callbacks._get_shared_memory()
    where = {"logging_info": shared_memory.GPULoggingInfo(mesh_location, thread, source_info)}
    acc, b = (gpu_callbacks.HostAllocationKey.from_array(key) for key in (acc, b))
    b_transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(b_transforms))
    b_value, *_ = memory.get_buffer_content(b, memory.access(b, b_transforms), thread, **where)
    acc_value, *_ = memory.get_buffer_content(acc, memory.access(acc, ()), thread, **where)
    product = acc_value + np.matmul(np.asarray(a), b_value, dtype=acc_value.dtype)
    memory.store_buffer_content(acc, memory.access(acc, ()), product, thread, **where)
    return token


def _store_accumulator(*, token, mesh_location, thread, acc, value, source_info):
    """acc = value."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    memory = gpu_callbacks._get_shared_memory()
    acc = gpu_callbacks.HostAllocationKey.from_array(acc)
    where = {"logging_info": shared_memory.GPULoggingInfo(mesh_location, thread, source_info)}
    memory.store_buffer_content(acc, memory.access(acc, ()), np.asarray(value), thread, **where)
    return token
