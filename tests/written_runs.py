"""Run folders that were written, not trained, and keep every rule of the track unless told otherwise."""

import dataclasses
import hashlib
import json

from senano_jax.config_file import write_config
from senano_jax.data.identity import ShardIdentity
from senano_jax.presets import demo
from senano_jax.runlog.data_record import write_data

STEPS, BATCH = 4, 4096
PARAMETERS = 6_632_527  # of the demo
URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/0123abcd/"
VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_{:06d}.bin"
H100 = "NVIDIA H100 80GB HBM3"


def run_config(**changes):
    config = demo()
    data = dataclasses.replace(config.data, val_tokens=10_485_760)
    return dataclasses.replace(config, **{"steps": STEPS, "batch_tokens": BATCH, "data": data} | changes)


def shard(name, **changes):
    digest = hashlib.sha256(name.encode()).hexdigest()
    return dataclasses.replace(ShardIdentity(name, 200_001_024, 100_000_000, digest, digest, URL + name), **changes)


def fineweb():
    return {"train": [shard(TRAIN.format(k)) for k in (1, 2)], "val": [shard(VAL)]}


def write_run(folder, *, steps=STEPS, loss=3.27, minutes=20, devices=(H100,) * 8, changes=(), earlier=()):
    """A run of which `steps` steps were done; `changes` are made to the lines of metrics.jsonl, by step."""
    folder.mkdir()
    write_config(folder / "config.json", run_config(), "demo", PARAMETERS)
    environments = [{"devices": [{"kind": kind, "platform": "gpu"} for kind in kinds]} for kinds in (*earlier, devices)]
    (folder / "environment.json").write_text(json.dumps(environments[-1] | {"earlier": environments[:-1]}))
    write_data(folder / "data.json", fineweb())
    records = [
        {"step": k, "tokens_trained": k * BATCH, "tokens_read": k * BATCH, "loss": 4.0} | dict(changes).get(k, {})
        for k in range(1, steps + 1)
    ]
    records.append(
        {"step": steps, "tokens_trained": steps * BATCH, "val_loss": loss, "train_time_ms": minutes * 60_000}
    )
    lines = [{key: value for key, value in record.items() if value is not None} for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
