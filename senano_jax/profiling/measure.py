"""One profile from configuration to figures, read from top to bottom."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from senano_jax.config import Config, Gpt2Config
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import validation_sequences
from senano_jax.errors import UserError
from senano_jax.model.build import Params, count_parameters
from senano_jax.model.loss import loss_is_fused
from senano_jax.plan import PlannedStage
from senano_jax.profiling.compilation import (
    Compilation,
    ExecutedWork,
    Memory,
    Program,
    compile_for_tracing,
    compile_program,
    executed_work,
    planned_memory,
)
from senano_jax.profiling.flops import ModelFlops, peak_flops, step_flops
from senano_jax.profiling.hlo import read_instructions
from senano_jax.profiling.kernels import KernelTimes, busy_fraction, kernel_times, read_events
from senano_jax.profiling.timing import Spread, StepRunner
from senano_jax.profiling.tokens import open_feed, synthetic_sequences
from senano_jax.training.evaluation import Evaluator, group_size
from senano_jax.training.mesh import place_batch
from senano_jax.training.state import init_state
from senano_jax.training.wiring import Wiring, wire

TRACED_STEPS = 2
EVALUATIONS = 3  # timed, after one that compiles
EVALUATION_ROUNDS = 8  # of each


@dataclass(frozen=True)
class Scope:
    """What to measure, besides compilation, arithmetic and memory."""

    stage: int  # index of the stage whose step it is
    windows: tuple[int, ...]  # long windows in blocks; the first one gets the whole report
    steps: int  # timed steps
    warmup: int  # steps before them
    evaluation: bool
    trace_dir: Path | None  # keep the profiler's traces here
    shards_required: bool  # never make up tokens


@dataclass(frozen=True)
class Speed:
    """Speed of a window of attention over all devices."""

    window_blocks: int
    flops: ModelFlops  # of one step
    step_ms: Spread  # from one finished step to the next, the next one always queued
    tokens_per_s: float
    mfu: float | None  # model FLOP/s over the devices' peak; None if that is unknown


@dataclass(frozen=True)
class Evaluation:
    """A round of an evaluation, on all devices: its length in the mean of a few."""

    tokens: int
    rounds: int  # queued one after the other, and timed together
    seq_len: int
    source: str
    milliseconds: Spread
    tokens_per_s: float
    model_flops: int


@dataclass(frozen=True)
class Kernels:
    """Of the first device, over a few traced steps."""

    busy: float  # part of the traced time in which it worked, with the program that training runs
    one_kernel_an_operation: bool  # traced without command buffers, so that every kernel has a name in the model
    times: KernelTimes


@dataclass(frozen=True)
class Report:
    """All that is measured of a preset."""

    parameters: int
    stage: int
    stages: int  # of the run
    device_kind: str
    devices: int
    micro_batches: int
    tokens_per_step: int
    seq_len: int
    loss_is_fused: bool  # one kernel makes log-sum-exp and gradient of the logits
    token_source: str
    compilation: Compilation
    executed: ExecutedWork
    memory: Memory | None
    peak_memory: int | None  # bytes allocated at most on the first device, and what it has
    memory_limit: int | None
    peak_flops: float | None  # of one device
    speed: Speed
    synchronised_ms: Spread
    host_ms: Spread
    sweep: tuple[Speed, ...]
    evaluation: Evaluation | None
    kernels: Kernels | None
    kernels_missing: str  # why there are none


def measure(config: Config, scope: Scope, say: Callable[[str], None]) -> Report:
    """Compiles the training step of a stage of `config` and runs it; `say` gets a line before each long part."""
    wiring = wire(config)
    mesh, stage = wiring.mesh, wiring.plan.stages[scope.stage]
    device = mesh.devices.flat[0]
    micro_batches = wiring.micro_batches[stage.index]
    feed = open_feed(config, stage, shards_required=scope.shards_required)
    with contextlib.closing(feed.batches):
        first_batch = next(feed.batches)
        state = wiring.to_shared(init_state(wiring.model, wiring.optimizer, config.seed, mesh))

        say("compiling")
        tokens, inputs = place_batch(mesh, first_batch, micro_batches), wiring.plan.inputs(stage.first)
        program = compile_program(wiring.train_steps[stage.index], state, tokens, *inputs)
        runner = StepRunner(program.run, inputs, state, mesh, micro_batches, feed)
        del state, tokens  # the runner donates the state; nothing may hold on to it

        peak = peak_flops(device.device_kind, config.dtype)

        def speed(window: int, step_ms: Spread) -> Speed:
            flops = step_flops(stage.model, first_batch[:, :-1], window)
            flops_per_s = flops.total / step_ms.median * 1000
            mfu = flops_per_s / (peak * mesh.size) if peak else None
            return Speed(window, flops, step_ms, stage.batch_tokens / step_ms.median * 1000, mfu)

        window = scope.windows[0]
        say(f"timing {scope.steps} steps twice at a window of {window} blocks")
        runner.steps(scope.warmup, window)
        synchronised = runner.synchronised(scope.steps, window)
        pipelined, host = runner.pipelined(scope.steps, window)
        sweep = []
        for swept in scope.windows[1:]:
            say(f"timing {scope.steps} steps at a window of {swept} blocks")
            runner.steps(scope.warmup, swept)
            sweep.append(speed(swept, runner.pipelined(scope.steps, swept)[0]))
        stats = device.memory_stats() or {}

        evaluation = None
        if scope.evaluation:
            say("timing the evaluation")
            evaluation = _time_evaluation(config, wiring, runner.params, window)

        say("tracing")
        kernels, kernels_missing = _trace(runner, program, window, scope.trace_dir)
    return Report(
        parameters=count_parameters(wiring.state.params),
        stage=stage.index,
        stages=len(wiring.plan.stages),
        device_kind=device.device_kind,
        devices=mesh.size,
        micro_batches=micro_batches,
        tokens_per_step=stage.batch_tokens,
        seq_len=stage.seq_len,
        loss_is_fused=_loss_is_fused(stage, stage.batch_tokens // mesh.size // micro_batches),
        token_source=feed.description,
        compilation=program.compilation,
        executed=executed_work(program.run),
        memory=planned_memory(program.run),
        peak_memory=stats.get("peak_bytes_in_use"),
        memory_limit=stats.get("bytes_limit"),
        peak_flops=peak,
        speed=speed(window, pipelined),
        synchronised_ms=synchronised,
        host_ms=host,
        sweep=tuple(sweep),
        evaluation=evaluation,
        kernels=kernels,
        kernels_missing=kernels_missing,
    )


def _loss_is_fused(stage: PlannedStage, tokens: int) -> bool:
    """Of micro-batches of `tokens` tokens."""
    model = stage.model
    if isinstance(model, Gpt2Config):
        return False
    return loss_is_fused(tokens, model.padded_vocab_size, model.cap)


def _time_evaluation(config: Config, wiring: Wiring, params: Params, window: int) -> Evaluation:
    """A few rounds, the next one always queued, as in training: on each device as many sequences at a time as
    training evaluates."""
    mesh = wiring.mesh
    length = config.data.val_seq_len
    sequences = config.data.val_tokens // length
    at_a_time = group_size(sequences, length, mesh.size)
    a_round = mesh.size * at_a_time
    count = a_round * max(min(sequences // a_round, EVALUATION_ROUNDS), 1)
    try:
        source = config.data.val_files
        rows = validation_sequences(source, find_shards(source), count * length, length)
    except UserError:  # no shards, or too short ones: the time does not depend on the words
        source = "synthetic documents"
        rows = synthetic_sequences(count, length + 1, config.model.vocab_size)
    evaluate = Evaluator(wiring.model, mesh, rows, at_a_time)
    evaluate(params, window)
    times = []
    for _ in range(EVALUATIONS):
        start = time.perf_counter()
        evaluate(params, window)
        times.append(1000 * (time.perf_counter() - start) / evaluate.rounds)
    spread, tokens = Spread.of(times), evaluate.tokens // evaluate.rounds
    flops = step_flops(config.model, rows[:, :-1], window, training=False).total // evaluate.rounds
    return Evaluation(tokens, evaluate.rounds, length, source, spread, tokens / spread.median * 1000, flops)


def _trace(runner: StepRunner, program: Program, window: int, folder: Path | None) -> tuple[Kernels | None, str]:
    """Kernels, or None and why not. The program that training runs tells how busy the device is; where its kernels
    hide in command buffers, the same program without them tells which operation takes how long."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="senano-trace-")))

        def events_of(name: str, compiled: jax.stages.Compiled):
            runner.steps(1, window, compiled)
            with jax.profiler.trace(str(folder / name), profiler_options=options):
                runner.steps(TRACED_STEPS, window, compiled)
            return read_events(folder / name)

        try:
            compiled, events = program.run, events_of("as_trained", program.run)
        except jax.errors.JaxRuntimeError as error:
            return None, f"the profiler failed: {str(error).splitlines()[0]}"
        busy = busy_fraction(events)
        if busy is None:
            return None, "the profiler recorded no device events"
        ungrouped = compile_for_tracing(program)
        if ungrouped is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # kernels by their own names are better than none
                if found := events_of("by_operation", ungrouped):
                    compiled, events = ungrouped, found
    times = kernel_times(events, read_instructions(compiled.as_text()), TRACED_STEPS)
    return Kernels(busy, compiled is not program.run, times), ""


def to_json(report: Report, config: Config, preset: str, environment: dict) -> dict:
    """Every figure of the report with its unit in the name, and what it was measured on."""
    return {
        "preset": preset,
        "config": dataclasses.asdict(config),
        "environment": environment,
        "report": dataclasses.asdict(report),
    }
