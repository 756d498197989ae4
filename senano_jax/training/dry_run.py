"""What a run would be, without running it: size, tokens, stages, shards, memory and time, as far as they are known."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from senano_jax.config import Config, settings
from senano_jax.config_check import check_config
from senano_jax.config_file import read_config
from senano_jax.data.shards import find_shards, open_shard
from senano_jax.data.stream import require_tokens, validation_source
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.plan import Plan, PlannedStage
from senano_jax.profiling.flops import peak_flops, step_flops
from senano_jax.runlog.run_folder import read_run_folder
from senano_jax.runlog.sinks import Sinks
from senano_jax.runlog.track_rules import MAX_PARAMETERS
from senano_jax.runlog.units import format_time, format_tokens
from senano_jax.runlog.writer import RunFolder
from senano_jax.sources import is_weights_file
from senano_jax.training.checkpoint import saved_checkpoints
from senano_jax.training.memory import device_bytes, resident_bytes, stage_activation_bytes
from senano_jax.training.resume import check_same_run, require_checkpoint, require_shared_folder
from senano_jax.training.wiring import Wiring, wire

LOGS = Path("logs")  # where the speed of earlier runs is looked for
USUAL_MFU = 0.4  # of 42% at the longest window on an H100 (README.md)
_WITHOUT_SPEED = ("seed", "steps", "data.", "optimizer.", "init_from")  # settings that a step's time does not depend on


def describe(config: Config, preset: str) -> None:
    """Prints it. JAX must have been started. Writes nothing, and allocates nothing on the devices.

    Raises UserError for what would keep the run from starting; behind the report, for what leaves one to print.
    """
    check_config(config)
    plan, faults = Plan(config), []

    def found(check: Callable[[], object]):
        """The result, or None and one more fault."""
        try:
            return check()
        except UserError as error:
            faults.append(str(error))
            return None

    parameters = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    over = parameters - MAX_PARAMETERS
    judged = f"{over:,} more than" if over > 0 else f"{-over:,} below"
    _say("preset", preset)
    _say("parameters", f"{parameters:,}: {judged} the track's {MAX_PARAMETERS:,}, read strictly")
    _say("tokens", f"{plan.total_tokens:,} trained on; the stream passes {plan.stream_tokens:,}")
    _say("steps", f"{plan.steps:,}, evaluations {_evaluations(config)}")
    for stage in plan.stages:
        _say(f"stage {stage.index}" if len(plan.stages) > 1 else "each step", _stage(plan, stage))
    data = config.data
    if paths := found(lambda: _shards("training shards", data.train_files, plan.stream_tokens)):
        found(lambda: require_tokens(data.train_files, paths, plan.stream_tokens, plan.longest_sequence))
    if paths := found(lambda: _shards("validation", data.val_files, data.val_tokens)):
        found(lambda: validation_source(data.val_files, paths, data.val_tokens, data.val_seq_len))
    found(lambda: Sinks(config))
    found(lambda: _check_folder(config))
    if config.init_from is not None:
        found(lambda: _check_weights(config.init_from))
    if wiring := found(lambda: wire(config)):
        devices = wiring.mesh.devices.flat
        hardware = f"{wiring.mesh.size} x {devices[0].device_kind}"
        for stage in plan.stages:
            _say("devices" if not stage.index else "", f"{hardware}: {_split(wiring, stage)}")
        _say("memory", _memory(wiring))
        machine = f"{jax.device_count()} x {devices[0].device_kind}"  # as a run's environment.json has it
        _say("time", _time(plan, machine, devices[0].device_kind, wiring.mesh.size))
    for fault in faults:
        _say("fault", fault)
    if faults:
        raise UserError(f"this run cannot start ({len(faults)} {'faults' if faults[1:] else 'fault'}, named above)")
    _say("", "nothing was written; without --dry-run the run starts, if its folder can be made and its files are sound")


def _say(label: str, text: str) -> None:
    if jax.process_index() == 0:
        print(f"{label:<17}{text}")


def _evaluations(config: Config) -> str:
    every = f"every {config.val_every} and at the end" if config.val_every else "at the end"
    return f"{every}, of {config.data.val_tokens:,} tokens"


def _stage(plan: Plan, stage: PlannedStage) -> str:
    steps = f"steps {stage.first:,} to {stage.end:,}: " if len(plan.stages) > 1 else ""
    first, last = plan.window(stage.first), plan.window(stage.end - 1)
    window = f"{first}" if first == last else f"{first} to {last}"
    return f"{steps}{stage.batch_tokens:,} tokens, {stage.sequences} x {stage.seq_len:,}; window {window} x 128"


def _shards(label: str, pattern: str, tokens: int) -> list[Path]:
    """Says whether they hold as many `tokens` and a last target. Raises UserError for one that cannot be read."""
    needed = f"{tokens + 1:,} tokens needed"
    try:
        paths = find_shards(pattern)
        held = sum(len(open_shard(path)) for path in paths)
    except UserError:
        _say(label, f"none to be read at {pattern}; {needed}")
        raise
    enough = "enough" if held > tokens else f"{tokens + 1 - held:,} are missing"
    _say(label, f"{len(paths)} files {pattern} with {held:,} tokens; {needed}: {enough}")
    return paths


def _check_folder(config: Config) -> None:
    require_shared_folder(config)
    folder = expand_home(config.run_dir or LOGS)
    if config.resume is not None:
        check_same_run(config, folder)
        if config.resume != "latest":
            with saved_checkpoints(folder) as (_, steps):
                require_checkpoint(config.resume, steps)
    elif config.run_dir is not None:
        RunFolder(folder).refuse_if_started()
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is no folder"
        raise UserError(f"--run-dir {folder} cannot be made or written: {there} {why}; choose another")


def _check_weights(source: str) -> None:
    path = expand_home(source)
    if not is_weights_file(source):
        with saved_checkpoints(path):
            return
    if not path.is_file():
        raise UserError(f"--init-from {source}: there is no such file; check the name")


def _split(wiring: Wiring, stage: PlannedStage) -> str:
    micro_batches = wiring.micro_batches[stage.index]
    each = stage.sequences // wiring.mesh.size // micro_batches
    return f"{micro_batches} micro-batches of {each} x {stage.seq_len:,} tokens on each"


def _memory(wiring: Wiring) -> str:
    """The estimate by which micro-batches are chosen."""
    dtype, devices = wiring.plan.config.dtype, wiring.mesh.size
    state = resident_bytes(jax.eval_shape(wiring.to_shared, wiring.state), wiring.mesh)
    activations = max(
        stage_activation_bytes(stage, dtype, devices, wiring.micro_batches[stage.index]) for stage in wiring.plan.stages
    )
    return (
        f"about {_gib(state + activations)} of {_gib(device_bytes(wiring.mesh))} GiB a device: {_gib(state)} of "
        f"weights, optimiser and gradients, {_gib(activations)} of activations (estimated)"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


class EarlierSpeed(NamedTuple):
    """Of one run, in tokens a second over all its devices."""

    tokens_per_s: float
    source: str


def _time(plan: Plan, machine: str, kind: str, devices: int) -> str:
    measured = next(earlier_speeds(plan.config, machine, LOGS), None)
    if measured is not None:
        milliseconds = plan.total_tokens / measured.tokens_per_s * 1000
        speed = f"{measured.tokens_per_s:,.0f} tokens/s"
        return f"about {format_time(milliseconds)} of training, at the {speed} of {measured.source}"
    seconds = seconds_at_usual_mfu(plan, kind, devices)
    if seconds is not None:
        return f"about {format_time(1000 * seconds)} of training, if {USUAL_MFU:.0%} of the GPUs' peak are used"
    return "not known here: no such run in logs/; python -m senano_jax.profile measures a step"


def earlier_speeds(config: Config, machine: str, logs: Path) -> Iterator[EarlierSpeed]:
    """Those of the runs in `logs` that had the same model and batches on as many devices of a machine like this one,
    the newest first; runs that cannot be read are passed over."""
    wanted = _speed_settings(config)
    for path in sorted(logs.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            ran = read_config(path)[0]
            if ran.devices != config.devices or _speed_settings(ran) != wanted:
                continue
            run = read_run_folder(path.parent)
        except UserError:
            continue
        timed = [point for point in run.points if point.train_time_ms]
        first = next((point for point in run.points if point.tokens), None)
        if run.hardware != machine or first is None or not timed:
            continue
        last = timed[-1]
        if first.train_time_ms and last.tokens > first.tokens:  # the first part has the compilation in it
            tokens, milliseconds = last.tokens - first.tokens, last.train_time_ms - first.train_time_ms
        else:
            tokens, milliseconds = last.tokens, last.train_time_ms
        yield EarlierSpeed(tokens / milliseconds * 1000, f"{path.parent} ({format_tokens(last.tokens)} tokens)")


def _speed_settings(config: Config) -> dict:
    return {name: value for name, value in settings(config).items() if not name.startswith(_WITHOUT_SPEED)}


def seconds_at_usual_mfu(plan: Plan, device_kind: str, devices: int) -> float | None:
    """Training time at USUAL_MFU, without compilation; None for a device or type whose peak is not known. Attention is
    counted as if each sequence were one document."""
    peak = peak_flops(device_kind, plan.config.dtype)
    if peak is None:
        return None
    total = 0
    for stage in plan.stages:
        tokens = np.ones((1, stage.seq_len), np.int32)
        window = plan.window(math.ceil((stage.first + stage.end) / 2))
        flops = step_flops(stage.model, tokens, window).total * stage.sequences
        total += flops * (stage.end - stage.first)
    return total / (devices * peak * USUAL_MFU)
