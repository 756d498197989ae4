"""What a step takes on 1 to 64 GPUs, from the bytes that travel and a few measured numbers: docs/scaling.md.

    python scripts/scaling.py --write docs/scaling.md

The model, of a step of B tokens on N GPUs:

    time  = B / N x time a token  +  optimiser  +  bytes / bandwidth
    optimiser = passes over memory, the same on every GPU  +  orthogonalisation / N, for matrices of the record's number
    bytes of a GPU: all-reduce of the gradients, float32         2 (N - 1) / N x 4 x parameters
                    all-gather of orthogonal steps, bfloat16       (N - 1) / N x 2 x numbers in matrices
                    with --share-matrices their all-reduce is a reduce-scatter, half as much

Nothing is overlapped, and a GPU is as fast with few tokens as with many, which no longer holds below some thousands.
"""

import argparse
import functools
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home, write_atomically
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.optim.groups import parameter_group
from senano_jax.presets import preset

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 14  # blocks, of all figures
GPUS = (1, 2, 4, 8, 16, 64)
OF_A_MACHINE = 8
BATCHES = (393_216, 131_072, 65_536)
CASE = ("system", "GPUs", "tokens a step", "matrices")  # columns that say what was measured

# Of `recurrent` on H100s, by senano_jax.profile (logs/profile-recurrent-{1,2}xh100.txt): the optimiser takes 8.76 ms on
# one GPU and 5.76 on two, communication 3.81 on two.
PASSES_MS, ORTHOGONALISATION_MS = 2.76, 6.0
COMMUNICATION_MS = 3.81
INFINIBAND = 400e9  # bytes/s of a machine: eight links of 400 Gb/s by their data sheet, not measured


@dataclass(frozen=True)
class System:
    """A preset, and what was measured of it."""

    name: str
    parameters: int
    matrices: int  # numbers in them
    token_us: float  # of one GPU, without the optimiser
    gpu: str


@dataclass(frozen=True)
class Measured:
    """A step at the full window."""

    system: str
    gpu: str
    gpus: int
    batch_tokens: int
    shared: bool
    ms: float
    source: str


@functools.cache
def sizes(name: str) -> tuple[int, int]:
    """Numbers in all parameters, and in the matrices."""
    config = preset(name)
    params = abstract_params(make_model(config.model, config.dtype))
    leaves = jax.tree.leaves_with_path(params)
    return count_parameters(params), sum(leaf.size for path, leaf in leaves if parameter_group(path) == "matrices")


def sent(parameters: int, matrices: int, gpus: int, shared: bool = False) -> float:
    """Bytes that each GPU sends in a step."""
    part = (gpus - 1) / gpus
    return part * (8 * (parameters - matrices) + (4 if shared else 8) * matrices + 2 * matrices)


def optimiser_ms(system: System, gpus: int) -> float:
    parameters, matrices = sizes("recurrent")
    return PASSES_MS * system.parameters / parameters + ORTHOGONALISATION_MS * system.matrices / matrices / gpus


def communication_ms(system: System, gpus: int, shared: bool = False) -> float:
    """At the bandwidth that two GPUs showed; where machines are joined, no faster than their links."""
    bandwidth = sent(*sizes("recurrent"), 2) / COMMUNICATION_MS * 1000
    if gpus > OF_A_MACHINE:
        bandwidth = min(bandwidth, INFINIBAND)
    return sent(system.parameters, system.matrices, gpus, shared) / bandwidth * 1000


def step_ms(system: System, batch_tokens: int, gpus: int, shared: bool = False) -> float:
    compute = batch_tokens / gpus * system.token_us / 1000
    return compute + optimiser_ms(system, gpus) + communication_ms(system, gpus, shared)


def measured(root: Path) -> Iterator[Measured]:
    """Medians at the full window: of senano_jax.profile, of a training run, and of scripts/bench_gpus.py."""
    for file in sorted(root.glob("profile-*.txt")):
        text = file.read_text()
        name = re.search(r"^([\w-]+): [\d,]+ parameters", text, re.MULTILINE)[1]
        tokens, gpus, gpu = re.search(r"of ([\d,]+) tokens on (\d+) x NVIDIA (\S+)", text).groups()
        ms = re.search(r"^back to back +([\d,.]+)", text, re.MULTILINE)[1]
        yield Measured(name, gpu, int(gpus), _number(tokens), False, _number(ms), f"logs/{file.name}")
    for file in root.glob("recurrent-4xh100-full/metrics.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        times = [record["step_ms"] for record in records if record.get("window") == WINDOW and "step_ms" in record]
        source = f"logs/{file.parent.name}"
        yield Measured("recurrent", "H100", 4, 393_216, False, statistics.median(times), source)
    for file in sorted((root / "gpus").glob("*.json")):
        document = json.loads(file.read_text())
        gpu = document["environment"]["devices"][0]["kind"].split()[1]
        for result in document["results"]:
            case = result["case"]
            if (ms := result["step_ms"].get(str(WINDOW))) is not None:
                shared = case["form"] == "shared"
                yield Measured(
                    case["preset"], gpu, case["gpus"], case["batch_tokens"], shared, ms, f"logs/gpus/{file.name}"
                )


def fitted(points: list[Measured]) -> dict[Measured, System]:
    """For each point the system with the time a token that another one asks for: that of one GPU in its own file, since
    machines differ by some per cent; else that of the fewest GPUs of its kind, replicated."""
    bases, systems = {}, {}
    for point in sorted((p for p in points if not p.shared), key=lambda p: p.gpus):
        if point.gpus == 1:
            bases.setdefault((point.system, point.source), point)
        bases.setdefault((point.system, point.gpu), point)
    for point in points:
        base = bases.get((point.system, point.source)) or bases[point.system, point.gpu]
        known = System(base.system, *sizes(base.system), 0.0, base.gpu)
        rest = base.ms - step_ms(known, base.batch_tokens, base.gpus)
        token_us = 1000 * rest * base.gpus / base.batch_tokens
        systems[point] = replace(known, token_us=token_us)
    return systems


def document(root: Path) -> str:
    points = list(measured(root))
    fits = fitted(points)
    if not fits:
        raise UserError(f"{root} holds no measured steps; give --logs the folder of the repository's logs")
    checks = [
        [*_case(p), f"{p.ms:,.1f}", f"{step_ms(fits[p], p.batch_tokens, p.gpus, p.shared):,.1f}", f"`{p.source}`"]
        for p in points
    ]
    systems: dict[str, System] = {}  # of the first GPU of its kind that was measured
    for point in points:
        systems.setdefault(point.system, fits[point])
    rows = []
    for system in systems.values():
        for batch in BATCHES:
            for gpus in GPUS:
                ms, shared_ms = (step_ms(system, batch, gpus, shared) for shared in (False, True))
                alone = step_ms(system, batch, 1)
                gigabytes = [sent(system.parameters, system.matrices, gpus, shared) / 1e9 for shared in (False, True)]
                steps = preset(system.name).steps * preset(system.name).batch_tokens / batch
                rows.append(
                    [
                        f"`{system.name}`", f"{batch:,}", str(gpus), f"{batch // gpus:,}",
                        " / ".join(f"{x:.2f}" for x in gigabytes), f"{communication_ms(system, gpus):.1f} / "
                        f"{communication_ms(system, gpus, True):.1f}", f"{ms:,.1f} / {shared_ms:,.1f}",
                        f"{alone / gpus / ms:.0%} / {alone / gpus / shared_ms:.0%}",
                        f"{steps * ms / 60_000:.1f}", f"{steps * ms / 3_600_000 * gpus:.2f}",
                    ]
                )  # fmt: skip
    table = _table(
        ["system", "tokens a step", "GPUs", "a GPU", "GB sent", "ms for it", "ms a step", "efficiency", "minutes a run",
         "GPU-hours"],
        rows,
    )  # fmt: skip
    alone_ms = {(p.source, p.system, p.batch_tokens): p.ms for p in points if p.gpus == 1}
    together = [
        [*_case(p), f"{speedup:.2f}x", f"{speedup / p.gpus:.1%}"]
        for p in points
        if p.gpus > 1 and (ms := alone_ms.get((p.source, p.system, p.batch_tokens))) and (speedup := ms / p.ms)
    ]
    speedups = _table([*CASE, "speed", "efficiency"], together)
    against = _table([*CASE, "measured ms", "model", "source"], checks)
    return TEXT.format(
        window=WINDOW,
        bandwidth=sent(*sizes("recurrent"), 2) / COMMUNICATION_MS / 1e6,
        checks=against,
        speedups=speedups,
        table=table,
        systems="; ".join(f"`{s.name}`: {s.token_us:.2f} us a token on one {s.gpu}" for s in systems.values()),
    )


def _case(point: Measured) -> list[str]:
    """Cells of the columns CASE."""
    matrices = "shared" if point.shared else "replicated"
    return [f"`{point.system}`", f"{point.gpus} x {point.gpu}", f"{point.batch_tokens:,}", matrices]


def _number(text: str) -> int | float:
    return json.loads(text.replace(",", ""))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """# Scaling

Written by `python scripts/scaling.py --write docs/scaling.md`, whose first lines tell the model: a step is its tokens
at the speed of one GPU, the optimiser, and the bytes that travel at {bandwidth:.0f} GB/s, the rate of two H100s of one
machine; nothing is overlapped. All figures are of a window of {window} blocks: the widest of `recurrent`, and of
`tied-recurrent` until 2026-11-29, whose attention has reached 40 since.

{systems}.
These are from profiles of 2026-11-27, with the kernels of their day and, of the two systems, with other documents;
[performance.md](performance.md) has what a step takes since.

## What was measured, and what the model says

{checks}

A row's time a token is that of one GPU in the same file, because machines differ by some per cent. Where a file has no
such row, it is that of the first row of the system on this kind of GPU. The profile on two H100s read the
bundled sample, 1.9% more arithmetic than the tokens of the first row.

Against one GPU of the same machine, by `scripts/bench_gpus.py` (JAX 0.11.2, 2026-11-27; each file has its command):

{speedups}

## What it predicts

Pairs are replicated / with `--share-matrices`. More than 8 GPUs are machines of 8, joined by 8 InfiniBand links of 400
Gb/s each: by their data sheet these are faster than what two GPUs showed over NVLink, so that they do not count.
Latency is not in the model. A run is the preset's tokens at this window throughout, without compilation and
evaluations, an upper bound for a run whose window grows to it; minutes and GPU-hours are of the replicated form.

{table}

**Where it ends.** At 393,216 tokens a step eight GPUs lose 4 to 5%, whatever the form of the optimiser's state. At
131,072 the parts that do not shrink with the number of GPUs, about 9 ms, are an eighth of a step of eight GPUs and half
of one of 64, where 2,048 tokens a GPU would be slower than the model has it. One machine is the place for these
systems; more machines are for more seeds at once.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=expand_home, default=ROOT / "logs", help="folder of the measurements")
    parser.add_argument("--write", type=expand_home, metavar="FILE", help="document to write (default: print it)")
    with one_line_errors():
        arguments = parser.parse_args()
        text = document(arguments.logs)
        if arguments.write:
            write_atomically(arguments.write, text.encode())
        else:
            print(text)
