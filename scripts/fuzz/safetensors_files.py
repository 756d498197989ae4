"""Weights as safetensors files."""

import json
import random
from pathlib import Path

import jax
import numpy as np

from fuzz.damage import NAMES, change, damaged, deep
from senano_jax.config_file import write_config
from senano_jax.interop.safetensors_file import config_in_safetensors, read_safetensors, write_safetensors
from senano_jax.presets import demo


class SafetensorsFiles:
    def __init__(self, seeds: Path):
        self._seed, config = seeds / "weights.safetensors", seeds / "weights.json"
        weights = {"a": {"b": np.ones((4, 8), np.float32)}, "c": np.ones(3, jax.numpy.bfloat16)}
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
        write_config(config, demo(), "demo", 1)
        write_safetensors(self._seed, weights, 3, config.read_text())

    def __call__(self, rng: random.Random, place: Path) -> str:
        content = self._seed.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = content[8 : 8 + length], content[8 + length :]
        path = place / "a.safetensors"
        how = rng.choice(["bytes", "header", "value", "value", "config", "deep", "name", "link"])
        if how == "bytes":
            content = damaged(rng, content)
        elif how == "header":
            content = _file(damaged(rng, header), data)
        elif how == "deep":
            content = _file(deep(rng), data)
        elif how in ("value", "config"):
            document = json.loads(header)
            if how == "value":
                change(rng, document)
            else:
                config = json.loads(document["__metadata__"]["config"])
                change(rng, config)
                document["__metadata__"]["config"] = json.dumps(config)
            content = _file(json.dumps(document).encode(), data)
        path.write_bytes(content)
        if how == "link":
            path.unlink()
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "a.safetensors", "/", "/etc/passwd"]))
        elif how == "name":
            path = Path(rng.choice(NAMES))
        if rng.random() < 0.5:
            config_in_safetensors(path)
        else:
            read_safetensors(path, self._abstract)
        return how


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
