"""Runs that keep their compiled steps, on a CPU that looks like a GPU to the step cache."""

import dataclasses
import json
import threading

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from senano_jax import train
from senano_jax.training import step_cache
from senano_jax.training.loop import train as run
from senano_jax.training.mesh import place_batch
from senano_jax.training.state import init_state

SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0", "--steps=4",
    "--batch-tokens=256", "--seq-len=128", "--final-window-tokens=128", "--data.val-tokens=256",
    "--data.val-seq-len=128", "--devices=2",
]  # fmt: skip


FILES = {"senano_jax/train.py": "as it is"}


def kept_steps(tmp_path, monkeypatch):
    """To be a fixture: the folder of the steps, on a machine that looks as if it had a GPU to the step cache alone."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(step_cache, "on_gpu", lambda: True)
    monkeypatch.setattr(step_cache, "_files", lambda: FILES)
    before = jax.config.jax_compilation_cache_dir
    reset_cache()  # JAX's own: it is the one of the folder that is asked for first
    yield tmp_path / "cache" / "steps"
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


def configured(folder, *flags):
    """Of a small run whose steps are kept in `folder`."""
    return train.parse_request([*SMALL, f"--compilation-cache={folder.parent}", *flags]).config


def arguments_of(wiring, index=0):
    """Those of the first step of a stage, with shapes and places alone that matter."""
    stage = wiring.plan.stages[index]
    tokens = np.zeros((stage.sequences, stage.seq_len + 1), np.uint16)
    state = wiring.to_shared(init_state(wiring.model, wiring.optimizer, 0, wiring.mesh))
    return state, place_batch(wiring.mesh, tokens, wiring.micro_batches[index]), *wiring.plan.inputs(stage.first)


def wait_for_writers():
    for thread in threading.enumerate():
        if thread.name == "step cache":
            thread.join()


def trained(config, path, **options):
    """What a run reports of its steps, the times left out."""
    folder = run(dataclasses.replace(config, run_dir=str(path)), "demo", quiet=True, **options)
    wait_for_writers()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if "ms" not in name and "per_s" not in name} for r in records]
