"""A training run from shards to final loss, read from top to bottom."""

import contextlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from senano_jax.config import Config
from senano_jax.config_check import check_config
from senano_jax.data.identity import needed_shards
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import TokenStream, require_tokens
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import count_parameters
from senano_jax.output import lasting_output
from senano_jax.plan import Plan
from senano_jax.runlog.progress import Progress
from senano_jax.runlog.sinks import Record, Sinks
from senano_jax.training.agreement import require_same_program
from senano_jax.training.clock import Clock
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import place_batch
from senano_jax.training.next_stage import NextStage
from senano_jax.training.own import NOTHING_OWN, Own
from senano_jax.training.processes import StopVote, together
from senano_jax.training.recorder import Recorder, RunningStep, wait_for_step
from senano_jax.training.resume import Bookmark, begin_or_resume, check_same_run, open_run, require_shared_folder
from senano_jax.training.state import params_to_evaluate
from senano_jax.training.step_cache import compiled_step, open_step_cache
from senano_jax.training.stop import Stopped, StopRequest
from senano_jax.training.wiring import Wiring, wire


def train(
    config: Config,
    preset: str,
    own: Own = NOTHING_OWN,
    *,
    quiet: bool = False,
    on_record: Callable[[Record], None] | None = None,
    keeps_steps: bool = False,
) -> Path:
    """Runs `config` (derived from the preset of that name), or goes on with it, and returns its run folder.

    `own` is what a program gives in place of what is configured, which names it (`naming`). `quiet` prints
    nothing; `on_record` is called with each line of metrics.jsonl, as a dictionary. `keeps_steps` finds compiled steps
    of earlier runs on disk, and keeps those of this one, where it can: for processes that run the package as its files
    have it.

    Raises UserError, before anything is allocated, for values, files or devices that cannot work; and, during the
    run, for a loss that is no longer finite, bad tokens, or a folder that can no longer be written. Raises Stopped if
    a signal asked it to stop, once the run is saved. JAX's settings are changed for the whole process.
    """
    start_jax(config.dtype, config.compilation_cache, config.deterministic)
    sinks, shards = _checked(config)
    wiring = wire(config, own)
    plan = wiring.plan
    step_cache = open_step_cache(config, own, wiring.mesh) if keeps_steps else None
    with together():
        evaluate = make_evaluator(config, wiring.model, wiring.mesh)
    vote = StopVote(wiring.mesh)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lasting_output(notice=True))
        progress = Progress(plan, visible=jax.process_index() == 0 and not quiet)
        run = stack.enter_context(open_run(config, preset, _needed_shards(plan, shards)))
        begun = begin_or_resume(wiring, preset, run, progress.say)
        if begun is None:
            progress.say(f"the run in {run.folder.path} is complete: {plan.steps} steps")
            return run.folder.path
        state, bookmark = begun
        first_step, evaluated = bookmark.step, bookmark.evaluated
        stack.enter_context(sinks.open(run.folder.path, first_step, progress.say))
        stream = stack.enter_context(contextlib.closing(_open_stream(plan, shards, bookmark)))
        clock = Clock(bookmark.train_ms)
        recorder = Recorder(run.folder, sinks, progress, clock, plan, run.newest_checkpoint, on_record)
        progress.say(_introduction(preset, wiring, run.folder.path, first_step))

        waiter = stack.enter_context(ThreadPoolExecutor(1))
        next_stage = stack.enter_context(contextlib.closing(NextStage(wiring, step_cache)))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(progress.starting_at(first_step))
        clock.start()
        for step in range(first_step, plan.steps + 1):
            last = step == plan.steps
            evaluation_due = last or (config.val_every and step % config.val_every == 0)
            checkpoint_due = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if evaluation_due or checkpoint_due or recorder.stopping:
                recorder.catch_up()
            stopping, val_loss = recorder.stopping, None
            if evaluation_due and not evaluated and (last or not stopping):
                clock.stop()
                progress.doing("evaluating")
                window = plan.evaluation_window(step)
                val_loss = evaluate(params_to_evaluate(state), window)
                recorder.evaluation(step, val_loss, window)
                if 0 < step == first_step:  # its checkpoint was saved in haste, without
                    run.checkpoints.add_loss(step, val_loss)
                clock.start()
            if (checkpoint_due or stopping) and step > first_step:
                progress.doing("saving")
                run.save(
                    step, wiring.to_replicated(state), stream.get_state()["next_token"], clock.milliseconds, val_loss
                )
            if last or stopping:
                break
            evaluated = False

            stage, inputs = plan.stage(step), plan.inputs(step)
            compiling = step in (first_step, stage.first)
            progress.doing("compiling" if compiling else "")
            stream.resize(stage.seq_len, stage.sequences)
            tokens = place_batch(wiring.mesh, next(stream).tokens, wiring.micro_batches[stage.index])
            if compiling:
                next_stage.wait()
                step_of_stage = wiring.train_steps[stage.index]
                train_step = compiled_step(step_of_stage, stage.visits, (state, tokens, *inputs), step_cache)
            state, metrics = train_step(state, tokens, *inputs)
            if compiling:
                next_stage.begin(stage.index + 1, train_step, state, tokens)
            for value in metrics:  # starts the copy now: one asked for later would wait for the steps queued behind
                value.copy_to_host_async()
            finished = waiter.submit(wait_for_step, metrics, vote(stop.received is not None), clock)
            recorder.queued(RunningStep(step + 1, finished, inputs, stream.get_state()["next_token"]))

        progress.doing("saving")
        run.checkpoints.steps()  # waits for the last save
        if stopping and not last:
            progress.say(
                f"{stop.received or 'another process'}: stopped after step {step}, saved; resume with: "
                f"python -m senano_jax.train --run-dir {shlex.quote(str(run.folder.path))} --resume"
            )
        elif peak := _peak_memory_mib():
            recorder.say(f"peak memory allocated: {peak} MiB")
    if stopping or stop.received is not None:
        raise Stopped(run.folder.path, stop.received or "another process")
    return run.folder.path


def _checked(config: Config) -> tuple[Sinks, list[Path]]:
    """The tools to watch the run with, and the shards to train on. Raises UserError for what cannot work whatever the
    devices are."""
    require_same_program(config)
    require_shared_folder(config)
    with together():
        check_config(config)
        if config.resume is not None:
            check_same_run(config, expand_home(config.run_dir))
        sinks = Sinks(config)
        plan, pattern = Plan(config), config.data.train_files
        shards = find_shards(pattern)
        require_tokens(pattern, shards, plan.stream_tokens, plan.longest_sequence)
    return sinks, shards


def _needed_shards(plan: Plan, shards: Sequence[Path]) -> dict[str, list[Path]]:
    """The shards that the run reads of each part."""
    data = plan.config.data
    return {
        "train": needed_shards(shards, plan.stream_tokens),
        "val": needed_shards(find_shards(data.val_files), data.val_tokens),
    }


def _open_stream(plan: Plan, shards: Sequence[Path], bookmark: Bookmark) -> TokenStream:
    stage = plan.stage(bookmark.step)
    return TokenStream(
        shards,
        stage.seq_len,
        stage.sequences,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        discard_tokens=plan.config.data.discard_micro_batch,
        start_token=bookmark.next_token,
    )


def _introduction(preset: str, wiring: Wiring, run_dir: Path, first_step: int) -> str:
    plan, mesh = wiring.plan, wiring.mesh
    parameters, count = count_parameters(wiring.state.params), len(plan.stages)
    stages = f" in {count} stages" if count > 1 else ""
    batches = _listed(f"{stage.batch_tokens:,}" for stage in plan.stages)
    where = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {_listed(wiring.micro_batches)} micro-batches"
    return (
        f"{preset}: {parameters:,} parameters, {plan.steps} steps{stages} of {batches} tokens ({where}), "
        f"run folder {run_dir}" + (f", from step {first_step}" if first_step else "")
    )


def _listed(values: Iterable[object]) -> str:
    """Each value once, in their order: "1, 2 and 4"."""
    *others, last = dict.fromkeys(map(str, values))
    return f"{', '.join(others)} and {last}" if others else last


def _peak_memory_mib() -> int:
    """Largest amount of device memory in use so far, in MiB; 0 where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) // 2**20
