"""A program's kernels in Mosaic GPU, compiled side by side while XLA works on the rest of it.

XLA compiles these kernels one after the other, 0.6 to 0.9 s each, once it has chosen everything else. What JAX's plugin
has compiled it keeps, by the kernel's hash, as long as the process lives. So each kernel also becomes a program of its
own, compiled in a thread, and XLA finds most of them ready when it comes to them.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

_TARGET = "mosaic_gpu_v2"
_HASH = "kernel_hash"
_CONFIG = "mhlo.backend_config"
_begun: set[bytes] = set()  # hashes of the kernels that this process has compiled, or is about to
_PREFIXES = {"f": "float", "bf": "bfloat", "i": "int", "ui": "uint"}  # of MLIR's names of types, and JAX's


class Kernel(NamedTuple):
    """One custom call of a lowered program: all that its compilation depends on."""

    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    attributes: dict[str, Any]  # of JAX's foreign function interface; the kernel itself is one of them


def compile_kernels_beside(lowered: jax.stages.Lowered) -> list[Future]:
    """Starts to compile each kernel of `lowered`, which is about to be compiled itself, unless that has begun before;
    returns at once, one future a kernel. An error of one may be ignored, as XLA will meet it again."""
    kernels = [kernel for kernel in kernels_of(lowered) if kernel.attributes[_HASH] not in _begun]
    if not kernels:
        return []
    _begun.update(kernel.attributes[_HASH] for kernel in kernels)
    pool = ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1), thread_name_prefix="kernel")
    compiling = [pool.submit(_compile, kernel) for kernel in kernels]
    pool.shutdown(wait=False)
    return compiling


def kernels_of(lowered: jax.stages.Lowered) -> list[Kernel]:
    """Each kernel of the program once, in the order of their first calls."""
    found: dict[bytes, Kernel] = {}

    def see(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and _target(operation) == _TARGET:
            attributes = {entry.name: _value(entry.attr) for entry in operation.attributes[_CONFIG]}
            if attributes[_HASH] not in found:
                found[attributes[_HASH]] = Kernel(_shaped(operation.operands), _shaped(operation.results), attributes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(see)
    return list(found.values())


def _target(custom_call: ir.Operation) -> str:
    return ir.StringAttr(custom_call.attributes["call_target_name"]).value


def _value(attribute: ir.Attribute) -> Any:
    return attribute.value_bytes if isinstance(attribute, ir.StringAttr) else attribute.value


def _shaped(values: Sequence[ir.Value]) -> tuple[jax.ShapeDtypeStruct, ...]:
    types = [ir.RankedTensorType(value.type) for value in values]
    return tuple(jax.ShapeDtypeStruct(tuple(t.shape), _dtype(str(t.element_type))) for t in types)


def _dtype(name: str) -> jnp.dtype:
    letters, bits = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    return jnp.dtype("bool" if name == "i1" else _PREFIXES[letters] + bits)


def _compile(kernel: Kernel) -> None:
    program(kernel).compile()


def program(kernel: Kernel) -> jax.stages.Lowered:
    """The kernel as the one call of a program, lowered for this process's default device."""
    call = jax.ffi.ffi_call(_TARGET, kernel.results)
    return jax.jit(lambda *operands: call(*operands, **kernel.attributes)).lower(*kernel.operands)
