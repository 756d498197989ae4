"""Logs of training: our run folders and the PyTorch program's text."""

import json
import random
import shutil
from pathlib import Path

from fuzz.damage import NAMES, change, damaged, deep
from senano_jax.config_file import write_config
from senano_jax.data.identity import ShardIdentity
from senano_jax.presets import demo
from senano_jax.runlog.data_record import FILE as DATA
from senano_jax.runlog.data_record import PARTS, write_data
from senano_jax.runlog.reader import read_log
from senano_jax.runlog.track_rules import check_rules

STEPS, TOKENS = 10, 4096


class RunFolders:
    def __init__(self, seeds: Path):
        self._seeds = seeds
        write_config(seeds / "run.json", demo(), "demo", 1)
        lines = []
        for step in range(STEPS + 1):
            loss, tokens = 11.0 - step / 9, TOKENS * step
            if step:
                lines.append({"step": step, "tokens_trained": tokens, "tokens_read": tokens, "loss": loss})
            if step % 5 == 0:
                time = 40.0 * step
                lines.append({"step": step, "tokens_trained": tokens, "val_loss": loss, "train_time_ms": time})
        (seeds / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def __call__(self, rng: random.Random, place: Path) -> str:
        shutil.copy(self._seeds / "metrics.jsonl", place / "metrics.jsonl")
        config = json.loads((self._seeds / "run.json").read_text()) | {"steps": STEPS}
        (place / "config.json").write_text(json.dumps(config))
        (place / "environment.json").write_text('{"devices": [{"kind": "cpu"}]}')
        (place / "log.txt").write_text("step:0/10\n")
        write_data(place / DATA, {part: [ShardIdentity(f"{part}.bin", 3072, 1024, "0" * 64)] for part in PARTS})
        name = rng.choice(["config.json", *["metrics.jsonl"] * 3, "environment.json", DATA])
        path = place / name
        how = rng.choice(["bytes", "value", "deep", "link", "gone", "folder", "lines"])
        if how == "bytes":
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif how == "value":
            lines = path.read_text().splitlines() if name == "metrics.jsonl" else [path.read_text()]
            at = rng.randrange(len(lines))
            document = json.loads(lines[at])
            part = rng.choice([None, *PARTS]) if name == DATA else None
            change(rng, document[part][0] if part else document)
            lines[at] = json.dumps(document)
            path.write_text("\n".join(lines) + "\n")
        elif how == "deep":
            path.write_bytes(deep(rng))
        elif how == "lines":
            lines = path.read_text().splitlines()
            rng.shuffle(lines)
            path.write_text("\n".join(lines * rng.choice([1, 2])))
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "link":
                path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", "/proc/self/mem", name, "../..", "/"]))
        read_log(rng.choice([place, place / "metrics.jsonl", place / "log.txt"]))
        if name == DATA:
            check_rules(place)
        return how


class TorchLogs:
    def __init__(self, seeds: Path):
        self._seed = seeds / "torch.txt"
        lines = ["import torch\n", "print(f'step:{step}/{steps} val_loss:{val_loss:.4f}')\n", "=" * 80 + "\n"]
        for step in range(STEPS + 1):
            time = f"train_time:{40 * step}ms"
            if step:
                lines.append(f"step:{step}/{STEPS} {time} step_avg:40.00ms\n")
            if step % 5 == 0:
                lines.append(f"step:{step}/{STEPS} val_loss:{11 - step / 9:.4f} {time} tokens:{step}.00M\n")
        self._seed.write_text("".join(lines))

    def __call__(self, rng: random.Random, place: Path) -> str:
        content = self._seed.read_bytes()
        path = place / "torch.txt"
        how = rng.choice(["bytes", "number", "long line", "name", "link", "lines"])
        if how == "bytes":
            content = damaged(rng, content)
        elif how == "number":
            text = content.decode()
            digits = [i for i, c in enumerate(text) if c.isdigit()]
            at = rng.choice(digits)
            content = (
                text[:at] + rng.choice(["9" * 5000, "-1", "nan", "inf", "1e999", "٣", "", "0x1"]) + text[at + 1 :]
            ).encode()
        elif how == "long line":
            content += b"step:1" + rng.choice([b"0", b" val_loss:1", b"(" * 9]) * rng.choice([3000, 100_000])
        elif how == "lines":
            lines = content.splitlines(keepends=True)
            rng.shuffle(lines)
            content = b"".join(lines)
        path.write_bytes(content)
        if how == "link":
            path = place / "link.txt"
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "link.txt", "/", "/etc/passwd"]))
        read_log(rng.choice(NAMES) if how == "name" else path, tokens_per_step=rng.choice([None, TOKENS]))
        return how
