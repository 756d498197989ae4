"""Ahead-of-time compilation, phase by phase, and what the compiler says of the result."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from senano_jax.kernels.hopper_compilation import compile_kernels_beside
from senano_jax.training.cache_events import cache_events

# Without command buffers (CUDA graphs) every kernel of a trace carries the name of its operation.
UNGROUPED_KERNELS = {"xla_gpu_enable_command_buffer": ""}


@dataclass(frozen=True)
class Compilation:
    """Phases in seconds of wall clock, and the persistent cache's part in the last one."""

    trace_s: float
    lower_s: float
    compile_s: float
    cache: Literal["hit", "miss", "off"]
    cache_saved_s: float  # compilation spared by a hit


@dataclass(frozen=True)
class ExecutedWork:
    """XLA's own count for one execution on one device; None where it gives none.

    Custom calls such as Pallas kernels count nothing, and a loop of unknown length counts as one turn.
    """

    flops: float | None
    bytes: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory, planned by the compiler."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of donated arguments
    temporaries: int
    code: int


@dataclass(frozen=True)
class Program:
    """A compiled function."""

    run: jax.stages.Compiled
    lowered: jax.stages.Lowered
    compilation: Compilation


def compile_program(jitted: Callable, *arguments: Any) -> Program:
    """Traces, lowers and compiles `jitted` for arguments of these shapes; runs nothing."""
    start = time.perf_counter()
    traced = jitted.trace(*arguments)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    compile_kernels_beside(lowered)
    with cache_events() as events:
        compiled = lowered.compile()
    compiled_at = time.perf_counter()
    cache = "hit" if "cache_hits" in events else "miss" if "compile_requests_use_cache" in events else "off"
    if jax.config.jax_compilation_cache_dir is None:
        cache = "off"
    saved = events.get("compile_time_saved_sec", 0.0)
    phases = Compilation(traced_at - start, lowered_at - traced_at, compiled_at - lowered_at, cache, saved)
    return Program(compiled, lowered, phases)


def compile_for_tracing(program: Program) -> jax.stages.Compiled | None:
    """The same program without command buffers; None where they do not exist or cannot be switched off."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return program.lowered.compile(compiler_options=UNGROUPED_KERNELS)
    except jax.errors.JaxRuntimeError:
        return None


def executed_work(compiled: jax.stages.Compiled) -> ExecutedWork:
    """FLOPs and bytes that the compiler counts in a program; None where it does not tell."""
    cost = compiled.cost_analysis() or {}
    return ExecutedWork(cost.get("flops"), cost.get("bytes accessed"))


def planned_memory(compiled: jax.stages.Compiled) -> Memory | None:
    """None where the backend does not tell."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
