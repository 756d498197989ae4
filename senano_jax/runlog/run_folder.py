"""Our own run folders: config.json, environment.json and metrics.jsonl."""

import json
from pathlib import Path

from senano_jax.errors import UserError
from senano_jax.runlog.curves import RunLog, TrainPoint, ValidationPoint
from senano_jax.runlog.log_lines import Line, PointCollector, read_lines

MAX_CONFIG_BYTES = 1 << 20
# What may differ between two seeds of one configuration: none of it changes what is computed.
_NOT_CONFIGURATION = {
    "seed",
    "run_dir",
    "run_id",
    "resume",
    "val_every",
    "checkpoint_every",
    "compilation_cache",
    "tensorboard",
    "wandb",
}


def read_run_folder(folder: Path, name: str | None = None) -> RunLog:
    """Reads one run; it is called `name`, or as its preset. Raises UserError for a damaged or empty one."""
    config = read_json(folder / "config.json")
    steps_total = config.get("steps")
    if not _is_count(steps_total) or steps_total == 0:
        raise UserError(f"{folder / 'config.json'}: steps is {steps_total!r}, not a count; restore the file")
    collector, notes = PointCollector(folder / "metrics.jsonl"), []
    trained = read = 0
    for line in read_lines(folder / "metrics.jsonl"):
        record = _record(line)
        if record is None:
            notes.append(f"line {line.number} of metrics.jsonl is cut off and was passed over")
            continue
        if "val_loss" not in record and "loss" not in record:
            continue  # a kind of record that later versions may add
        step = line.count_of("step", record.get("step"))
        if step > steps_total:
            line.damaged(f"step {step}, in a run of {steps_total} steps (config.json)")
        tokens = line.count_of("tokens_trained", record.get("tokens_trained"))
        if "val_loss" in record:
            loss, time = line.number_of("val_loss", record["val_loss"]), record.get("train_time_ms")
            time = None if time is None else line.number_of("train_time_ms", time)
            collector.add_validation(line, ValidationPoint(step, tokens, loss, time))
        else:
            loss = line.number_of("loss", record["loss"])
            position = line.count_of("tokens_read", record["tokens_read"]) if "tokens_read" in record else None
            read = max(read, tokens if position is None else position)
            collector.add_train(line, TrainPoint(step, tokens, loss, None, position))
        trained = max(trained, tokens)
    points = collector.evaluations()
    parameters, seed, preset = config.get("parameters"), config.get("seed"), config.get("preset")
    return RunLog(
        name=name or (preset if isinstance(preset, str) and preset.strip() else folder.resolve().name),
        implementation="senano_jax",
        group_key="config " + json.dumps(_configuration(config), sort_keys=True),
        points=points,
        train_points=tuple(collector.train),
        tokens_trained=trained,
        tokens_read=read or None,
        complete=points[-1].step == steps_total,
        steps_total=steps_total,
        parameters=parameters if _is_count(parameters) else None,
        seed=seed if _is_count(seed) else None,
        hardware=_hardware(folder / "environment.json"),
        notes=tuple(notes),
    )


def _record(line: Line) -> dict | None:
    """The object on a line; None for a last line whose writer was stopped inside it."""
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError):
        if line.ended:
            line.damaged("not a JSON object")
        return None
    if not isinstance(record, dict):
        line.damaged("not a JSON object")
    return record


def _configuration(value: object) -> object:
    """`value` without the fields in which two seeds of one configuration may differ, at any depth."""
    if isinstance(value, dict):
        return {key: _configuration(item) for key, item in value.items() if key not in _NOT_CONFIGURATION}
    return value


def _hardware(path: Path) -> str | None:
    """The devices of environment.json in words, such as "8 x NVIDIA H100"; None if it does not say."""
    if not path.exists():
        return None
    devices = read_json(path).get("devices")
    if isinstance(devices, str):
        return devices
    if not isinstance(devices, list):
        return None
    kinds = [str(device.get("kind", "device") if isinstance(device, dict) else device) for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or None


def read_json(path: Path) -> dict:
    """The object in a file of a run folder. Raises UserError for a missing, damaged or very large one."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a complete run folder") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB; restore the file the run wrote")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; restore the file the run wrote")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15
