"""Where a step's time goes on the device: a profiler trace, its kernels, and the groups they fall into.

On a GPU kernels run inside command buffers (CUDA graphs), whose trace events carry kernel names and nothing else. The
name of a fusion's kernel is that of its instruction, so it can be traced back to the model; a matrix product of a
library cannot. A compilation without command buffers names the instruction of each event (`hlo_op`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from senano_jax.profiling.hlo import HEAD, OPTIMIZER, UNATTRIBUTED, Instruction, kernel_key, module_of, pass_of

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
PRODUCTS, ELEMENTWISE, REDUCTIONS = "matrix products", "elementwise, norms, rotary", "reductions"
COPIES, COMMUNICATION, OTHER = "copies, memset", "communication", "other"
CONTAINERS = {"while", "call", "conditional", "async-start"}  # their time is that of the instructions inside

_COMMUNICATION = re.compile(r"nccl|all_?reduce|all_?gather|reduce_?scatter|collective|nvshmem", re.IGNORECASE)
_PRODUCT = re.compile(r"nvjet|gemm|cublas|cutlass|cudnn|matmul|\bdot|_dot|ynn_fusion|splitk", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset|copy|transpose|bitcast", re.IGNORECASE)
_REDUCTION = re.compile(r"reduce|reduction|scan|sort", re.IGNORECASE)


class Event(NamedTuple):
    """One kernel, copy or thunk on a device's time line."""

    name: str
    instruction: str | None  # the profiler's hlo_op
    start_ns: float
    duration_ns: float


@dataclass(frozen=True)
class KernelTime:
    """The calls of one kernel in a step."""

    name: str
    group: str
    module: str
    direction: str  # forward, backward, recomputed or ""
    calls_per_step: float
    ms_per_step: float


@dataclass(frozen=True)
class KernelTimes:
    """Of the traced steps."""

    kernels: tuple[KernelTime, ...]  # the longest first
    attributed: float  # share of the time that is traced back to a part of the model


def read_events(folder: Path) -> list[Event]:
    """Events of the first GPU, or of the CPU's threads, from the newest trace under `folder`, in order of time."""
    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    planes = sorted(jax.profiler.ProfileData.from_file(str(files[-1])).planes, key=lambda plane: plane.name)
    gpus = [plane for plane in planes if "GPU" in plane.name]
    lines = [line for plane in gpus[:1] for line in plane.lines if line.name.startswith("Stream")]
    on_gpu = bool(lines)
    if not on_gpu:
        lines = [line for plane in planes if plane.name == "/host:CPU" for line in plane.lines]
    events = []
    for line in lines:
        for event in line.events:
            instruction = next((str(value) for key, value in event.stats if key == "hlo_op"), None)
            if on_gpu or instruction is not None:
                events.append(Event(event.name, instruction, event.start_ns, event.duration_ns))
    return sorted(events, key=lambda event: event.start_ns)


def busy_fraction(events: Iterable[Event]) -> float | None:
    """Part of the time from the first event's start to the last one's end in which at least one runs."""
    ordered = sorted(events, key=lambda event: event.start_ns)
    if not ordered:
        return None
    busy, reached = 0.0, ordered[0].start_ns
    for event in ordered:
        end = event.start_ns + event.duration_ns
        busy += max(0.0, end - max(reached, event.start_ns))
        reached = max(reached, end)
    return busy / max(reached - ordered[0].start_ns, 1e-9)


def kernel_times(events: Iterable[Event], instructions: Mapping[str, Instruction], steps: int) -> KernelTimes:
    """Sums events over `steps` steps by kernel and part of the model."""
    calls: dict[tuple, int] = defaultdict(int)
    nanoseconds: dict[tuple, float] = defaultdict(float)
    for event in events:
        instruction = _instruction_of(event, instructions)
        if instruction is not None and instruction.opcode in CONTAINERS:
            continue
        op_name = instruction.op_name if instruction else ""
        group = group_of(event.name, instruction)
        module, direction = module_of(op_name), pass_of(op_name)
        if group in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
            module, direction = "attention", direction or group.removeprefix("attention ")
        key = (event.name, group, module, direction)
        calls[key] += 1
        nanoseconds[key] += event.duration_ns
    kernels = [KernelTime(*key, calls[key] / steps, nanoseconds[key] / 1e6 / steps) for key in nanoseconds]
    kernels.sort(key=lambda kernel: -kernel.ms_per_step)
    total = sum(kernel.ms_per_step for kernel in kernels)
    known = sum(kernel.ms_per_step for kernel in kernels if kernel.module != UNATTRIBUTED)
    return KernelTimes(tuple(kernels), known / total if total else 0.0)


def group_of(kernel: str, instruction: Instruction | None) -> str:
    """The kind of work a kernel does, by its name and, where known, the instruction it was compiled from."""
    op_name = instruction.op_name if instruction else ""
    if "flash_forward" in kernel:
        return ATTENTION_FORWARD
    if "flash_backward" in kernel:
        return ATTENTION_BACKWARD
    if _COMMUNICATION.search(kernel):
        return COMMUNICATION
    if module_of(op_name) == OPTIMIZER:
        return OPTIMIZER
    if module_of(op_name) == HEAD:
        return HEAD
    if "/attention/while/" in op_name:  # the banded implementation's loop over key blocks
        return ATTENTION_BACKWARD if "transpose(" in op_name else ATTENTION_FORWARD
    if _PRODUCT.search(kernel) or (instruction and instruction.opcode == "dot"):
        return PRODUCTS
    if _COPY.match(kernel.removeprefix("wrapped_").removeprefix("loop_").removeprefix("input_")):
        return COPIES
    if _REDUCTION.search(kernel):
        return REDUCTIONS
    return ELEMENTWISE if instruction or "fusion" in kernel or kernel.startswith("wrapped_") else OTHER


def time_by(kernels: Iterable[KernelTime], *fields: str) -> dict[tuple[str, ...], float]:
    """Milliseconds a step by the named fields, the longest first."""
    totals: dict[tuple[str, ...], float] = defaultdict(float)
    for kernel in kernels:
        totals[tuple(getattr(kernel, field) for field in fields)] += kernel.ms_per_step
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _instruction_of(event: Event, instructions: Mapping[str, Instruction]) -> Instruction | None:
    """By the profiler's hlo_op, or by the kernel's name where that is the name of an instruction."""
    for name in (event.instruction, event.name):
        if name is not None and (found := instructions.get(kernel_key(name))):
            return found
    return None
