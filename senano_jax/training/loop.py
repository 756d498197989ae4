"""A training run from shards to final loss, read from top to bottom."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from senano_jax.config import Config, check_config
from senano_jax.data.identity import needed_shards
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import TokenStream, require_tokens
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import count_parameters, make_model
from senano_jax.optim.groups import make_optimizer
from senano_jax.output import lasting_output
from senano_jax.plan import window_blocks
from senano_jax.runlog.data_record import DataRecord
from senano_jax.runlog.progress import Progress
from senano_jax.runlog.sinks import Sinks
from senano_jax.training.clock import Clock
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import DATA_AXIS, choose_micro_batches, make_mesh, place_batch
from senano_jax.training.processes import StopVote, together
from senano_jax.training.recorder import Recorder, RunningStep, wait_for_step
from senano_jax.training.resume import Position, begin_or_resume, check_same_run, open_run
from senano_jax.training.step import make_train_step
from senano_jax.training.stop import Stopped, StopRequest


def train(config: Config, preset: str) -> Path:
    """Runs `config` (derived from the preset of that name), or goes on with it, and returns its run folder.

    Raises UserError, before anything is allocated, for values, files or devices that cannot work; and, during the
    run, for a loss that is no longer finite, bad tokens, or a folder that can no longer be written. Raises Stopped if
    a signal asked it to stop, once the run is saved. JAX's settings are changed for the whole process.
    """
    start_jax(config.dtype, config.compilation_cache)
    if jax.process_count() > 1 and config.run_dir is None:
        raise UserError("a run of several processes needs --run-dir, the same folder for all of them")
    with together():
        check_config(config)
        if config.resume is not None:
            check_same_run(config, expand_home(config.run_dir))
        sinks = Sinks(config)
        shards = find_shards(config.data.train_files)
        discard = config.data.discard_micro_batch
        stream_tokens = config.steps * (config.batch_tokens + discard) - discard
        require_tokens(config.data.train_files, shards, stream_tokens)

    mesh = make_mesh(config.devices)
    micro_batches = choose_micro_batches(config, mesh.size)
    model = make_model(config.model, config.dtype)
    with together():
        evaluate = make_evaluator(config, model, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    train_step = make_train_step(model, optimizer, mesh)
    vote = StopVote(mesh)
    needed = {
        "train": needed_shards(shards, stream_tokens),
        "val": needed_shards(find_shards(config.data.val_files), config.data.val_tokens),
    }

    with contextlib.ExitStack() as stack:
        stack.enter_context(lasting_output(notice=True))
        progress = Progress(config.steps, visible=jax.process_index() == 0)
        run, checkpoints = stack.enter_context(open_run(config, preset))
        data_record = stack.enter_context(DataRecord(run.path, needed))
        begun = begin_or_resume(config, preset, run, data_record, checkpoints, model, optimizer, mesh, progress.say)
        if begun is None:
            progress.say(f"the run in {run.path} is complete: {config.steps} steps")
            return run.path
        state, position = begun
        first_step, evaluated = position.step, position.evaluated
        stack.enter_context(sinks.open(run.path, first_step, progress.say))
        stream = stack.enter_context(
            contextlib.closing(
                TokenStream(
                    shards,
                    config.seq_len,
                    config.batch_sequences,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    discard_tokens=discard,
                    start_token=position.next_token,
                )
            )
        )
        clock = Clock(position.train_ms)
        recorder = Recorder(run, sinks, progress, clock, config, lambda: next(iter(checkpoints.steps()), None))
        where = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {micro_batches} micro-batches"
        parameters = count_parameters(state.params)
        intro = f"{preset}: {parameters:,} parameters, {config.steps} steps of {config.batch_tokens:,} tokens"
        progress.say(f"{intro} ({where}), run folder {run.path}" + (f", from step {first_step}" if first_step else ""))

        waiter = stack.enter_context(ThreadPoolExecutor(1))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(progress.starting_at(first_step))
        clock.start()
        stopping = False
        running = None  # the newest step; it is recorded once the next one is queued behind it, so no device waits
        for step in range(first_step, config.steps + 1):
            window = window_blocks(step, config.steps, config.final_window_tokens, config.initial_window_tokens)
            last = step == config.steps
            evaluation_due = last or (config.val_every and step % config.val_every == 0)
            checkpoint_due = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if running is not None and (evaluation_due or checkpoint_due or stopping):
                stopping |= recorder.step(running)
                running = None
            val_loss = None
            if evaluation_due and not evaluated and (last or not stopping):
                clock.stop()
                progress.doing("evaluating")
                val_loss = evaluate(state.params, window)
                recorder.evaluation(step, val_loss, window)
                if 0 < step == first_step:  # its checkpoint was saved in haste, without
                    checkpoints.add_loss(step, val_loss)
                clock.start()
            if (checkpoint_due or stopping) and step > first_step:
                position = Position(
                    step=step,
                    next_token=stream.get_state()["next_token"],
                    train_ms=clock.milliseconds,
                    evaluated=val_loss is not None,
                    run_folder=run.position(),
                )
                progress.doing("saving")
                data_record.wait()
                checkpoints.save(step, state, position._asdict(), val_loss)
            if last or stopping:
                break
            evaluated = False
            progress.doing("compiling" if step == first_step else "")

            batch = next(stream)
            tokens = place_batch(mesh, batch.tokens, micro_batches)
            state, metrics = train_step(state, tokens, np.int32(window))
            for value in metrics:  # starts the copy now: one asked for later would wait for the steps queued behind
                value.copy_to_host_async()
            finished = waiter.submit(wait_for_step, metrics, vote(stop.received is not None), clock)
            if running is not None:
                stopping = recorder.step(running)
            running = RunningStep(step + 1, finished, window, stream.get_state()["next_token"])

        progress.doing("saving")
        checkpoints.steps()  # waits for the last save
        if stopping and not last:
            progress.say(
                f"{stop.received or 'another process'}: stopped after step {step}, saved; resume with: "
                f"python -m senano_jax.train --run-dir {run.path} --resume"
            )
        elif peak := _peak_memory_mib():
            recorder.say(f"peak memory allocated: {peak} MiB")
    if stopping or stop.received is not None:
        raise Stopped(run.path, stop.received or "another process")
    return run.path


def _peak_memory_mib() -> int:
    """Largest amount of device memory in use so far, in MiB; 0 where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) // 2**20
