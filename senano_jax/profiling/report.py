"""The report in words: tables of figures with units."""

from collections.abc import Iterable, Sequence

from senano_jax.profiling.kernels import time_by
from senano_jax.profiling.measure import TRACED_STEPS, Evaluation, Kernels, Report, Speed
from senano_jax.profiling.timing import Spread
from senano_jax.runlog.tables import Table

LISTED_KERNELS = 20
_NAME_WIDTH = 60
_GIB = 2**30


def tables(report: Report) -> list[Table]:
    """Sections in reading order."""
    sections = [_compilation(report), _arithmetic(report), _memory(report), _steps(report)]
    if report.sweep:
        sections.append(_sweep(report))
    if report.evaluation:
        sections.append(_evaluation(report.evaluation))
    if report.kernels:
        sections += [_groups(report.kernels), _modules(report.kernels), _kernels(report.kernels)]
    return sections


def remarks(report: Report) -> list[str]:
    """What the figures mean and where they end."""
    lines = [
        "Model FLOPs: matrix products of every layer application and the head, and attention over the visible pairs of "
        "one batch, forward and twice that backward; neither recomputation nor the optimiser.",
        "Back to back: from one finished step to the next, the next one always queued, as in training. The host's "
        "part: the next batch, its transfer, and the call, which waits where a GPU can be given no more kernels ahead.",
        "XLA's count is for one device; custom calls such as Pallas attention are left out, and a loop may count once.",
    ]
    if report.peak_flops is None:
        lines.append(f"MFU unknown: no bfloat16 peak for {report.device_kind}, or float32 activations.")
    if not report.loss_is_fused:
        lines.append(
            "Head and loss: left to XLA, in several passes over the logits. The kernel that makes one of them takes a "
            "GPU and a soft-cap."
        )
    if report.kernels is None:
        return [*lines, f"Kernel table not available: {report.kernels_missing}."]
    lines.append(
        f"Kernels: {TRACED_STEPS} traced steps, on the first GPU or all threads of a CPU; "
        f"{report.kernels.times.attributed:.0%} of their time is traced back to a part of the model. "
        "Kernels may overlap, so that their sum can exceed the step."
    )
    if report.kernels.one_kernel_an_operation:
        lines.append("Kernel times are those of the same program without command buffers; the busy share is with them.")
    return lines


def _compilation(report: Report) -> Table:
    phases = report.compilation
    cache = phases.cache + (f", spared {phases.cache_saved_s:.1f} s" if phases.cache == "hit" else "")
    return _pairs(
        "Compilation",
        ("trace", f"{phases.trace_s:.2f} s"),
        ("lower", f"{phases.lower_s:.2f} s"),
        ("compile", f"{phases.compile_s:.2f} s"),
        ("persistent cache", cache),
    )


def _arithmetic(report: Report) -> Table:
    flops, tokens = report.speed.flops, report.tokens_per_step
    executed = report.executed
    rows = [
        ("matrix products", _tera(flops.matrix_products), _giga(flops.matrix_products / tokens)),
        ("attention", _tera(flops.attention), _giga(flops.attention / tokens)),
        ("model FLOPs", _tera(flops.total), _giga(flops.total / tokens)),
    ]
    if executed.flops:
        rows.append(("XLA's count", _tera(executed.flops), _giga(executed.flops * report.devices / tokens)))
    if executed.bytes:
        rows.append(("XLA's bytes accessed", f"{executed.bytes / 1e9:,.2f} GB", ""))
    title = f"Arithmetic of a step, window of {report.speed.window_blocks} blocks"
    return Table(title, ("", "a step", "a token"), tuple(rows))


def _memory(report: Report) -> Table:
    rows = []
    if memory := report.memory:
        rows = [
            ("arguments", _gib(memory.arguments)),
            ("temporaries", _gib(memory.temporaries)),
            ("outputs", _gib(memory.outputs)),
            ("outputs in place of arguments", _gib(memory.aliased)),
            ("code", _gib(memory.code)),
        ]
    peak = "not told by this backend" if report.peak_memory is None else _gib(report.peak_memory)
    if report.peak_memory is not None and report.memory_limit:
        peak += f" of {_gib(report.memory_limit)}"
    return _pairs("Memory of one device", *rows, ("peak in use", peak))


def _steps(report: Report) -> Table:
    speed = report.speed
    title = f"{speed.step_ms.n} steps of {report.tokens_per_step:,} tokens, window of {speed.window_blocks} blocks"
    rows = (
        ("back to back", *_spread(speed.step_ms), *_rates(speed)),
        ("one at a time", *_spread(report.synchronised_ms), "", ""),
        ("host's part", *_spread(report.host_ms), "", ""),
    )
    return Table(title, ("ms", "median", "min", "p10", "p90", "max", "tokens/s", "MFU"), rows)


def _sweep(report: Report) -> Table:
    speeds = sorted([report.speed, *report.sweep], key=lambda speed: speed.window_blocks)
    rows = tuple(
        (
            str(speed.window_blocks),
            f"{speed.flops.total / report.tokens_per_step / 1e9:.4f}",
            *_spread(speed.step_ms),
            *_rates(speed),
        )
        for speed in speeds
    )
    headers = ("window", "GFLOP", "median", "min", "p10", "p90", "max", "tokens/s", "MFU")
    return Table("By window in blocks, one compilation: model FLOPs a token, ms a step", headers, rows)


def _evaluation(evaluation: Evaluation) -> Table:
    return _pairs(
        f"Evaluation, {evaluation.tokens:,} tokens at a time",
        ("sequence", f"{evaluation.seq_len:,} tokens of {evaluation.source}"),
        ("time", f"{evaluation.milliseconds.median:,.1f} ms, in the mean of {evaluation.rounds} queued together"),
        ("speed", f"{evaluation.tokens_per_s:,.0f} tokens/s"),
        ("model FLOP/s", f"{evaluation.model_flops / evaluation.milliseconds.median / 1e9:,.3f} TFLOP/s"),
    )


def _groups(kernels: Kernels) -> Table:
    title = f"Kernels by kind; the device is busy {kernels.busy:.1%} of the time"
    return _shares(title, ("kind",), time_by(kernels.times.kernels, "group"))


def _modules(kernels: Kernels) -> Table:
    return _shares("Kernels by module", ("module", "pass"), time_by(kernels.times.kernels, "module", "direction"))


def _kernels(kernels: Kernels) -> Table:
    total = sum(kernel.ms_per_step for kernel in kernels.times.kernels)
    listed = kernels.times.kernels[:LISTED_KERNELS]
    rows = tuple(
        (
            kernel.name[:_NAME_WIDTH],
            kernel.group,
            f"{kernel.module} {kernel.direction}".strip(),
            f"{kernel.calls_per_step:g}",
            f"{kernel.ms_per_step:.3f}",
            f"{kernel.ms_per_step / total:.1%}",
        )
        for kernel in listed
    )
    title = f"The {len(listed)} longest of {len(kernels.times.kernels)} kernels, a step"
    return Table(title, ("kernel", "kind", "module", "calls", "ms", "share"), rows)


def _shares(title: str, headers: Sequence[str], totals: dict[tuple[str, ...], float]) -> Table:
    total = sum(totals.values())
    rows = [(*names, f"{ms:.2f}", f"{ms / total:.1%}") for names, ms in totals.items()]
    rows.append(("sum", *("" for _ in headers[1:]), f"{total:.2f}", "100.0%"))
    return Table(title, (*headers, "ms a step", "share"), tuple(rows))


def _pairs(title: str, *rows: tuple[str, str]) -> Table:
    return Table(title, ("", ""), rows)


def _spread(spread: Spread) -> Iterable[str]:
    times = (spread.median, spread.min, spread.p10, spread.p90, spread.max)
    return (f"{ms:,.1f}" if ms >= 100 else f"{ms:.2f}" for ms in times)


def _rates(speed: Speed) -> tuple[str, str]:
    return f"{speed.tokens_per_s:,.0f}", "-" if speed.mfu is None else f"{speed.mfu:.1%}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3f} TFLOP"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.4f} GFLOP"


def _gib(size: int) -> str:
    return f"{size / _GIB:,.3f} GiB"
