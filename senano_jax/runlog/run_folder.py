"""Our own run folders: config.json, environment.json and metrics.jsonl."""

import json
import math
from pathlib import Path

from senano_jax.config import FREE_NAMES, settings
from senano_jax.config_check import check_config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import read_json_object
from senano_jax.plan import Plan
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.data_record import read_data
from senano_jax.runlog.log_lines import Line, PointCollector, is_not_finite, read_lines
from senano_jax.runlog.validation import Text, Validation


def read_run_folder(folder: Path, name: str | None = None, *, evaluated: bool = True) -> RunLog:
    """Reads one run; it is called `name`, or as its preset. Raises UserError for a damaged one, and for one that has
    not evaluated unless `evaluated` is False."""
    config = read_json_object(folder / "config.json")
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
            time = record.get("train_time_ms")
            time = None if time is None else line.number_of("train_time_ms", time)
            collector.add_validation(line, step, tokens, record["val_loss"], time)
        else:
            position = line.count_of("tokens_read", record["tokens_read"]) if "tokens_read" in record else None
            read = max(read, tokens if position is None else position)
            if not is_not_finite(record["loss"]):
                line.number_of("loss", record["loss"])
            # The run ends with the step that has no finite gradient, though its loss was computed before.
            diverges = is_not_finite(record.get("grad_norm"))
            collector.add_train(line, step, tokens, math.nan if diverges else record["loss"], None, position)
        trained = max(trained, tokens)
    points = collector.evaluations() if evaluated else tuple(collector.validation)
    parameters, seed, preset = config.get("parameters"), config.get("seed"), config.get("preset")
    return RunLog(
        name=name or (preset if isinstance(preset, str) and preset.strip() else folder.resolve().name),
        implementation="senano_jax",
        group_key="config " + json.dumps(_configuration(folder / "config.json", config), sort_keys=True, default=repr),
        points=points,
        train_points=tuple(collector.train),
        tokens_trained=trained,
        tokens_read=read or None,
        complete=bool(points) and points[-1].step == steps_total and not collector.diverged,
        steps_total=steps_total,
        parameters=parameters if _is_count(parameters) else None,
        seed=seed if _is_count(seed) else None,
        hardware=_hardware(folder / "environment.json"),
        diverged=collector.diverged,
        validation=_validation(folder, config.get("data"), notes),
        planned_tokens=_planned_tokens(folder / "config.json", config),
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


def _configuration(path: Path, document: dict) -> dict:
    """What two seeds of one configuration have in common, fields that `document` does not name at their defaults. Of a
    configuration that this version cannot read it is what is written there."""
    try:
        config, _ = read_config(path)
    except UserError:
        return _without(document, {*FREE_NAMES, "seed"})
    return {name: value for name, value in settings(config).items() if name != "seed"}


def _planned_tokens(path: Path, document: dict) -> int | None:
    """The length of the run's schedule. Of a configuration that this version cannot run, None if it has stages."""
    try:
        config, _ = read_config(path)
        check_config(config)
    except UserError:
        batch = document.get("batch_tokens")
        return document["steps"] * batch if _is_count(batch) and not document.get("stages") else None
    return Plan(config).total_tokens


def _without(value: object, names: set[str]) -> object:
    """`value` without the fields of these names, at any depth."""
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def _validation(folder: Path, settings: object, notes: list[str]) -> Validation:
    """From data.json and config.json; what is damaged there is a note, as the curve does not need it."""
    tokens = settings.get("val_tokens") if isinstance(settings, dict) else None
    try:
        shards = read_data(folder)
    except UserError as error:
        notes.append(f"what it was validated on is not known: {error}")
        shards = None
    texts = None if shards is None else tuple(Text(shard.name, shard.sha256) for shard in shards["val"])
    return Validation(texts, tokens if _is_count(tokens) else None)


def _hardware(path: Path) -> str | None:
    """The devices of environment.json in words, such as "8 x NVIDIA H100"; None if it does not say."""
    if not path.exists():
        return None
    devices = read_json_object(path).get("devices")
    if isinstance(devices, str):
        return devices
    if not isinstance(devices, list):
        return None
    kinds = [str(device.get("kind", "device") if isinstance(device, dict) else device) for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15
