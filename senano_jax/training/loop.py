"""A training run from shards to final loss, read from top to bottom."""

import contextlib
import math
from pathlib import Path

import jax
import numpy as np

from senano_jax.config import Config, check_config
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import TokenStream, require_tokens
from senano_jax.errors import UserError
from senano_jax.optim.groups import make_optimizer
from senano_jax.optim.schedules import learning_rate_factor, muon_momentum, window_blocks
from senano_jax.runlog.progress import Progress
from senano_jax.runlog.writer import RunFolder, new_run_dir
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.clock import Clock
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import DATA_AXIS, choose_micro_batches, make_mesh, place_batch
from senano_jax.training.state import abstract_params, count_parameters, init_state, make_model, with_params
from senano_jax.training.step import StepMetrics, make_train_step
from senano_jax.training.weights import load_weights


def train(config: Config, preset: str) -> Path:
    """Runs `config` (derived from the preset of that name) and returns its run folder.

    Raises UserError, before anything is allocated, for values, files or devices that cannot work; and, during the
    run, for a loss that is no longer finite.
    """
    check_config(config)
    shards = find_shards(config.data.train_files)
    tokens_per_step = config.batch_tokens + config.data.discard_micro_batch
    require_tokens(config.data.train_files, shards, config.steps * tokens_per_step - config.data.discard_micro_batch)

    mesh = make_mesh(config.devices)
    micro_batches = choose_micro_batches(config, mesh.size)
    model = make_model(config)
    evaluate = make_evaluator(config, model, mesh)
    abstract = abstract_params(model)
    parameters = count_parameters(abstract)

    run = RunFolder(Path(config.run_dir or new_run_dir(preset)), config, preset, parameters)
    optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    state = init_state(model, optimizer, config.seed, mesh)
    if config.init_from is not None:
        state = with_params(state, load_weights(config.init_from, config.model, abstract, mesh), mesh)
    train_step = make_train_step(model, optimizer, mesh)
    stream = TokenStream(
        shards,
        config.seq_len,
        config.batch_sequences,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        discard_tokens=config.data.discard_micro_batch,
    )
    every_step = np.arange(config.steps)
    lr_factors = np.asarray(learning_rate_factor(every_step, config.steps, config.optimizer))
    momenta = np.asarray(muon_momentum(every_step, config.optimizer))
    clock = Clock()

    def record_step(step: int, metrics: StepMetrics, window: int, tokens_read: int, finished_before_ms: float) -> float:
        """Waits for a step (counted from 1), records it, and returns when it had finished, in ms of training time."""
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        finished_ms = clock.milliseconds
        if not math.isfinite(loss + grad_norm):
            saved = checkpoints.latest_step()
            kept = "no checkpoint was saved" if saved is None else f"the newest checkpoint is that of step {saved}"
            raise UserError(
                f"step {step} has loss {loss} and gradient norm {grad_norm}; {kept}; "
                "lower the learning rates, or look at the data"
            )
        step_ms = finished_ms - finished_before_ms
        tokens_per_s = config.batch_tokens / step_ms * 1000
        run.metric(
            step=step,
            tokens_trained=step * config.batch_tokens,
            tokens_read=tokens_read,
            loss=loss,
            grad_norm=grad_norm,
            lr=float(lr_factors[step - 1]),
            momentum=float(momenta[step - 1]),
            window=window,
            step_ms=round(step_ms, 3),
            tokens_per_s=round(tokens_per_s, 1),
        )
        line = f"step:{step}/{config.steps} {_times(finished_ms, step)} loss:{loss:.4f} tokens/s:{tokens_per_s:.0f}"
        run.log(line)
        progress.step(step, loss, tokens_per_s, line)
        return finished_ms

    def record_evaluation(step: int, val_loss: float, window: int) -> None:
        tokens, train_ms = step * config.batch_tokens, clock.milliseconds
        run.metric(step=step, tokens_trained=tokens, val_loss=val_loss, window=window, train_time_ms=round(train_ms, 3))
        say(f"step:{step}/{config.steps} val_loss:{val_loss:.4f} {_times(train_ms, step)} tokens:{tokens / 1e6:.2f}M")

    def say(line: str) -> None:
        run.log(line)
        progress.say(line)

    with (
        run,
        contextlib.closing(stream),
        Checkpoints(run.path / "checkpoints") as checkpoints,
        Progress(config.steps, visible=jax.process_index() == 0) as progress,
    ):
        say(
            f"{preset}: {parameters:,} parameters, {config.steps} steps of {config.batch_tokens:,} tokens "
            f"({mesh.size} x {mesh.devices.flat[0].device_kind}, {micro_batches} micro-batches), run folder {run.path}"
        )
        clock.start()
        finished_ms = 0.0
        running = None  # the newest step; it is recorded once the next one is queued behind it, so no device waits
        for step in range(config.steps + 1):
            window = window_blocks(step, config.steps, config.final_window_tokens)
            last = step == config.steps
            evaluation_due = last or (config.val_every and step % config.val_every == 0)
            checkpoint_due = last or (config.checkpoint_every and step and step % config.checkpoint_every == 0)
            if running is not None and (evaluation_due or checkpoint_due):
                finished_ms, running = record_step(*running, finished_ms), None
            if evaluation_due:
                clock.stop()
                record_evaluation(step, evaluate(state.params, window), window)
                clock.start()
            if checkpoint_due:
                checkpoints.save(step, state, stream.get_state())
            if last:
                break

            batch = next(stream)
            tokens = place_batch(mesh, batch.tokens, micro_batches)
            state, metrics = train_step(state, tokens, np.int32(window))
            for value in metrics:  # starts the copy now: one asked for later would wait for the steps queued behind
                value.copy_to_host_async()
            if running is not None:
                finished_ms = record_step(*running, finished_ms)
            running = (step + 1, metrics, window, stream.get_state()["next_token"])

        if peak := _peak_memory_mib():
            say(f"peak memory allocated: {peak} MiB")
    return run.path


def _times(train_ms: float, step: int) -> str:
    return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"


def _peak_memory_mib() -> int:
    """Largest amount of device memory in use so far, in MiB; 0 where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) // 2**20
