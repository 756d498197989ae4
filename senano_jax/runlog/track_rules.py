"""The rules of the track, each held against what a run folder says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from senano_jax.config import Config
from senano_jax.config_check import check_config
from senano_jax.config_file import read_config
from senano_jax.data.fineweb import DATASET, TRAINING_SHARD, VALIDATION_SHARD
from senano_jax.files import read_json_object
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.plan import Plan
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.data_record import PARTS, Shards, read_data
from senano_jax.runlog.run_folder import read_run_folder
from senano_jax.runlog.units import format_time, format_tokens

MAX_PARAMETERS = 162_000_000
MAX_LOSS = 3.28
VALIDATION_TOKENS = 10_485_760
DEVICES, DEVICE_KIND = 8, "H100"
MAX_TIME_MS = 30 * 60 * 1000

Status = Literal["pass", "fail", "not verifiable"]


@dataclass(frozen=True)
class Verdict:
    """One rule and what became of it."""

    rule: str
    status: Status
    figure: str
    """What was found, in words."""
    value: float | None = None
    """The number that was judged, where it is one."""


def check_rules(folder: Path) -> list[Verdict]:
    """All rules, for the run in `folder`. Makes no array: parameters are counted from shapes.

    Raises UserError for a folder that is not one of a run, or a damaged one.
    """
    config, run, data = read_config(folder / "config.json")[0], read_run_folder(folder), read_data(folder)
    return [
        *parameter_rules(config, run),
        loss_rule(config, run),
        order_rule(config, run, data),
        fineweb_rule(data),
        time_rule(config, run, _devices(folder / "environment.json", config)),
    ]


def parameter_rules(config: Config, run: RunLog) -> list[Verdict]:
    """Embeddings and inactive parameters count; the limit as the record reads it, 162M rounded, and strictly."""
    check_config(config)
    rounded, strict = "parameters, rounded as in the record: <= 162M", f"parameters, strictly: <= {MAX_PARAMETERS:,}"
    if config.own_model is not None:
        figure = f"a program's own model ({config.own_model}), which the run folder does not hold"
        if run.parameters is not None:
            figure += f"; it says that there were {run.parameters:,}"
        return [Verdict(rule, "not verifiable", figure) for rule in (rounded, strict)]
    count = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    if run.parameters not in (None, count):
        figure = f"config.json describes a model of {count:,} and says that the run had {run.parameters:,}"
        return [Verdict(rule, "not verifiable", figure) for rule in (rounded, strict)]
    millions, excess = round(count / 1e6), count - MAX_PARAMETERS
    return [
        Verdict(rounded, _status(millions <= MAX_PARAMETERS / 1e6), f"{millions}M", millions * 10**6),
        Verdict(strict, _status(excess <= 0), f"{count:,}" + (f", {excess:,} too many" if excess > 0 else ""), count),
    ]


def loss_rule(config: Config, run: RunLog) -> Verdict:
    """The validation loss, of the whole run and over the tokens that the track asks for."""
    rule, final = f"validation loss: <= {MAX_LOSS}", run.final
    if run.diverged:
        return Verdict(rule, "fail", f"diverged: the loss is no number from {run.diverged} on")
    figure = f"{final.val_loss:.4f} after {format_tokens(final.tokens)} tokens"
    if not run.complete:
        return Verdict(rule, "not verifiable", f"{figure}; {_progress(run)}", final.val_loss)
    if final.val_loss > MAX_LOSS:
        return Verdict(rule, "fail", figure, final.val_loss)
    if config.data.val_tokens != VALIDATION_TOKENS:
        figure += f", on {config.data.val_tokens:,} validation tokens instead of {VALIDATION_TOKENS:,}"
        return Verdict(rule, "not verifiable", figure, final.val_loss)
    return Verdict(rule, "pass", figure, final.val_loss)


def order_rule(config: Config, run: RunLog, data: Shards | None) -> Verdict:
    """From the stream position that metrics.jsonl has for every step."""
    rule = "every token once, in order"
    if config.data.discard_micro_batch:
        return Verdict(rule, "fail", f"{config.data.discard_micro_batch:,} tokens are skipped after every step")
    if twice := _twice(data):
        return Verdict(rule, "fail", f"{twice[0]} and {twice[1]} have the same content")
    plan = Plan(config)
    for step, point in enumerate(run.train_points, start=1):
        tokens = plan.tokens_after(step)
        if point.step != step:
            return Verdict(rule, "fail", f"metrics.jsonl has no line for step {step}")
        if point.tokens != tokens:
            return Verdict(rule, "fail", f"{point.tokens:,} tokens trained on after step {step}, not {tokens:,}")
        if point.tokens_read is None:
            return Verdict(rule, "not verifiable", f"metrics.jsonl has no tokens_read for step {step}")
        if point.tokens_read != tokens:
            figure = f"{point.tokens_read:,} tokens read and {tokens:,} trained on after step {step}"
            return Verdict(rule, "fail", figure)
    steps = len(run.train_points)
    trained = plan.tokens_after(steps)
    figure = f"{format_tokens(trained)} tokens in {steps:,} steps without a gap"
    if config.init_from is not None:
        figure += f"; but it began with weights from {config.init_from}, and what those had read is not known"
        return Verdict(rule, "not verifiable", figure)
    if steps < config.steps:
        return Verdict(rule, "not verifiable", f"{figure}; {_progress(run)}")
    return Verdict(rule, "pass", figure, trained)


def fineweb_rule(data: Shards | None) -> Verdict:
    """The chain: the hub tells a checksum for a name, the download script keeps it, the run computes its own.

    The folder is believed; who doubts it asks the hub again, at the addresses in data.json.
    """
    rule = "FineWeb only, its shards in order"
    if data is None:
        return Verdict(rule, "not verifiable", "the run folder has no data.json")
    shards = [shard for part in PARTS for shard in data[part]]
    for shard in shards:
        if None not in (shard.sha256, shard.published_sha256) and shard.sha256 != shard.published_sha256:
            figure = f"{shard.name} has SHA-256 {shard.sha256}, published is {shard.published_sha256}"
            return Verdict(rule, "fail", figure)
    for shard in shards:
        if shard.published_sha256 is None or f"/{DATASET}/" not in (shard.published_url or ""):
            figure = f"no published checksum of {shard.name} is known: fetch or check it with download_fineweb.py"
            return Verdict(rule, "not verifiable", figure)
        if shard.sha256 is None:
            return Verdict(rule, "not verifiable", f"the run ended before it had a checksum of {shard.name}")
    training = [TRAINING_SHARD.format(k + 1) for k in range(max(1, len(data["train"])))]
    for part, expected in (("train", training), ("val", [VALIDATION_SHARD])):
        names = [shard.name for shard in data[part]]
        if names != expected:
            figure = f"{part} shards are {', '.join(names) or 'none'} instead of {', '.join(expected)}"
            return Verdict(rule, "fail", figure)
    source = shards[0].published_url.rpartition("/")[0]
    return Verdict(rule, "pass", f"{len(shards)} shards, each with the checksum published at {source}", len(shards))


def time_rule(config: Config, run: RunLog, devices: Sequence[str]) -> Verdict:
    """The training clock, which stops for evaluations; `devices` are the kinds of those the run used."""
    rule = f"training on {DEVICES} x {DEVICE_KIND}: < {MAX_TIME_MS // 60_000} minutes"
    time, kinds = run.final and run.final.train_time_ms, " and ".join(dict.fromkeys(devices))
    if not time or not devices:
        return Verdict(rule, "not verifiable", "the run folder does not say how long it took, or on what")
    figure = f"{format_time(time)} on {len(devices)} x {kinds} for {format_tokens(run.final.tokens)} tokens"
    if len(devices) == DEVICES and all(DEVICE_KIND in kind for kind in devices):
        if time >= MAX_TIME_MS:
            return Verdict(rule, "fail", figure, time)
        if run.complete:
            return Verdict(rule, "pass", figure, time)
        return Verdict(rule, "not verifiable", f"{figure}; {_progress(run)}", time)
    planned = Plan(config).total_tokens
    scaled = time * planned / run.final.tokens * len(devices) / DEVICES if run.final.tokens else None
    figure += f" ({run.final.tokens / time * 1000:,.0f} tokens/s, compilation included)"
    if scaled and len(devices) != DEVICES:
        figure += (
            f"; NOT MEASURED, if speed grew with the number of devices: {format_time(scaled)} on {DEVICES} x {kinds} "
            f"for {format_tokens(planned)} tokens"
        )
    return Verdict(rule, "not verifiable", figure)


def _status(passed: bool) -> Status:
    return "pass" if passed else "fail"


def _progress(run: RunLog) -> str:
    return f"the run is at step {run.final.step if run.final else 0} of {run.steps_total}"


def _twice(data: Shards | None) -> tuple[str, str] | None:
    """Names of two shards with one content; nobody may train on the validation shard either."""
    seen: dict[str, str] = {}
    for shard in [shard for part in PARTS for shard in data[part]] if data else ():
        if shard.sha256 in seen:
            return seen[shard.sha256], shard.name
        if shard.sha256 is not None:
            seen[shard.sha256] = shard.name
    return None


def _devices(path: Path, config: Config) -> list[str]:
    """The kinds of the devices that every part of the run used; none if it does not say, or if the parts differ."""
    if not path.exists():
        return []
    document = read_json_object(path)
    earlier = document.get("earlier")
    parts = [*(earlier if isinstance(earlier, list) else []), document]
    parts = [part.get("devices") for part in parts if isinstance(part, dict)]
    if any(part != parts[0] for part in parts) or not isinstance(parts[0], list):
        return []
    return [str(device.get("kind")) for device in parts[0] if isinstance(device, dict)][: config.devices]
