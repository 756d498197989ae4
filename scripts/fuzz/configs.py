"""config.json of a run."""

import contextlib
import json
import random
from pathlib import Path

from fuzz.damage import change, damaged, deep
from senano_jax.config_check import check_config
from senano_jax.config_file import read_config, write_config
from senano_jax.data.shards import find_shards
from senano_jax.errors import UserError
from senano_jax.presets import demo


class Configs:
    def __init__(self, seeds: Path):
        self._seed = seeds / "config.json"
        write_config(self._seed, demo(), "demo", 1)

    def __call__(self, rng: random.Random, place: Path) -> str:
        content = self._seed.read_bytes()
        path = place / "config.json"
        how = rng.choice(["bytes", "value", "value", "value", "deep", "large"])
        if how == "bytes":
            content = damaged(rng, content)
        elif how == "value":
            document = json.loads(content)
            for _ in range(rng.choice([1, 1, 3])):
                change(rng, document)
            content = json.dumps(document).encode()
        elif how == "deep":
            content = deep(rng)
        else:
            content = content[:-3] + b',"x":"' + b"x" * (2 << 20) + b'"}'
        path.write_bytes(content)
        config, _ = read_config(path)
        check_config(config)
        with contextlib.suppress(UserError):
            find_shards(config.data.train_files[:200])
        return how
