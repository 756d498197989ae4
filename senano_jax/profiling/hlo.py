"""Which part of the model an instruction of a compiled program belongs to, read from the program's text."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_OPCODE = re.compile(r"(?:^|\s)(?P<opcode>[a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'op_name="(?P<path>(?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"calls=%?(?P<computation>[\w.\-]+)")
_LAYER = re.compile(r"layer_\d+")
_FEATURES = re.compile(r"\bGpt2?\.features\b")

UNATTRIBUTED = "unattributed"
OPTIMIZER, REDUCE, HEAD, ACCUMULATION = "optimiser", "gradient reduction", "head + loss", "gradient accumulation"
EMBEDDING = "embedding, rotary tables, intervals"
RESIDUAL = "residual stream, skips, norms"


@dataclass(frozen=True)
class Instruction:
    """What a profile needs of an instruction of a compiled program."""

    opcode: str
    op_name: str  # path of scopes, e.g. jit(step)/.../layer_3/attention/dot_general; "" if unknown


def read_instructions(hlo_text: str) -> dict[str, Instruction]:
    """All instructions by `kernel_key` of their names.

    A fusion whose own path names no part of the model takes the path most frequent among the instructions in it.
    """
    instructions: dict[str, Instruction] = {}
    called: dict[str, str] = {}
    inside: dict[str, Counter] = {}
    paths_here: Counter = Counter()
    for line in hlo_text.splitlines():
        if not line.startswith(" "):
            if header := _COMPUTATION.match(line):
                paths_here = inside.setdefault(header["name"], Counter())
            continue
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(match["rest"]) if match else None
        if not match or not opcode:
            continue
        path = _OP_NAME.search(match["rest"])
        op_name = path["path"] if path else ""
        if module_of(op_name) != UNATTRIBUTED:
            paths_here[op_name] += 1
        elif computation := _CALLS.search(match["rest"]):
            called[kernel_key(match["name"])] = computation["computation"]
        instructions[kernel_key(match["name"])] = Instruction(opcode["opcode"], op_name)
    for key, computation in called.items():
        if inside.get(computation):
            frequent = inside[computation].most_common(1)[0][0]
            instructions[key] = Instruction(instructions[key].opcode, frequent)
    return instructions


def kernel_key(name: str) -> str:
    """Name of an instruction as its kernel spells it: fusion.3 is compiled to a kernel fusion_3."""
    return re.sub(r"[.\-]", "_", name)


def module_of(op_name: str) -> str:
    """The part of the step that a path of scopes lies in.

    The model is known by names that its modules must keep: the method `features`, in it `trunk`, in it layers
    `layer_<n>` with submodules `attention` and `mlp`.
    """
    scopes = op_name.split("/")
    if "optimizer" in scopes:
        return OPTIMIZER
    if "reduce" in scopes:
        return REDUCE
    inside = itertools.dropwhile(lambda scope: not _LAYER.fullmatch(scope), scopes)
    if next(inside, None) is not None:
        return next((scope for scope in inside if scope in ("attention", "mlp")), RESIDUAL)
    if "trunk" in scopes:
        return RESIDUAL
    if _FEATURES.search(op_name):
        return EMBEDDING
    if any("Gpt" in scope for scope in scopes):
        return HEAD
    return ACCUMULATION if scopes[-1] in ("add", "add_any") and "while" in scopes else UNATTRIBUTED


def pass_of(op_name: str) -> str:
    """forward, backward or recomputed; "" for the head, whose two passes are one, and outside the model."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if _FEATURES.search(op_name) else ""
