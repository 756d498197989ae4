"""Logs of training: our run folders and the text of other programs."""

import json
import random
import shutil
from pathlib import Path

from fuzz.damage import NAMES, change, damaged, deep
from senano_jax.config_file import write_config
from senano_jax.data.identity import ShardIdentity
from senano_jax.errors import UserError
from senano_jax.presets import demo
from senano_jax.runlog.data_record import FILE as DATA
from senano_jax.runlog.data_record import PARTS, write_data
from senano_jax.runlog.reader import read_log, read_logs
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


# How a program prints an evaluation and, if it does, a step of training.
DIALECTS = (
    (
        "step:{step}/{total} val_loss:{loss:.4f} train_time:{time}ms tokens:{step}.00M",
        "step:{step}/{total} train_time:{time}ms step_avg:40.00ms",
    ),
    ("step:{step}/{total} train_loss:3.1 ema:0 val_loss:{loss:.4f} val_bpb:1.2 train_time:{time}s", None),
    ("{step}/{total} val_loss: {loss:.4f} val_bpb: 1.2", "{step}/{total} train_loss: {loss:.4f} train_time: 0.{step}m"),
    ("s:{step} tel:{loss:.4f}", "s:{before} trl:{loss:.4f} lr:0.001 norm:0.3"),
    ("step {step}: train loss 3.1, val loss {loss:.4f}", "iter {before}: loss {loss:.4f}, time 9.0ms, mfu 9.0%"),
    ("Step {step:05d} | Val BPB: 1.2 | Val Loss: {loss:.6f}", "step {before:05d} (9.00%) | loss: {loss:.6f} | dt: 9ms"),
    ("Step {step:05d} | Validation bpb: {loss:.6f}", "step {before:05d}/{total:05d} (9.00%) | loss: {loss:.6f}"),
)
PREFIXES = (
    "",
    "[rank0]: ",
    "0: ",
    "2026-01-01 00:00:00 INFO ",
    "\x1b[32m",
    "99%|####   | 9/10 [00:01]",
    " 9%|#9   |\r",
)
WHOLE = ("read one", "read several")


class TorchLogs:
    """Logs of every dialect, with prefixes and with several runs in a file, damaged; and whole ones, of which every
    evaluation must be read."""

    def __init__(self, seeds: Path):
        self._head = "import torch\nprint(f'step:{step}/{steps} val_loss:{val_loss:.4f}')\n" + "=" * 80 + "\n"

    def __call__(self, rng: random.Random, place: Path) -> str:
        path = place / "torch.txt"
        how = rng.choice(["bytes", "number", "long line", "name", "link", "lines", "diverged", *WHOLE])
        runs = rng.choice([1, 2, 5]) if how != "read one" else 1
        dialect, prefix = rng.choice(DIALECTS[:-1] if how in WHOLE else DIALECTS), rng.choice(PREFIXES)
        lines = [line for run in range(runs) for line in _lines(run, dialect)]
        content = (self._head + "".join(f"{prefix}{line}\n" for line in lines)).encode()
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
            content += rng.choice([b"step:1", b"Step 1 ", b"s:1 "]) + rng.choice(
                [b"0", b" val_loss:1", b"(" * 9, b"|", b"\r", b"\x1b[", b" # "]
            ) * rng.choice([3000, 100_000])
        elif how == "lines":
            mixed = content.splitlines(keepends=True)
            rng.shuffle(mixed)
            content = b"".join(mixed)
        elif how == "diverged":
            content = content.replace(b"10.4", rng.choice([b"nan", b"-inf", b"NaN"]))
        path.write_bytes(content)
        if how == "link":
            path = place / "link.txt"
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "link.txt", "/", "/etc/passwd"]))
        batch = rng.choice([None, TOKENS]) if how not in WHOLE else TOKENS
        try:
            logs = read_logs(rng.choice(NAMES) if how == "name" else path, tokens_per_step=batch)
        except UserError as error:
            if how in WHOLE:
                raise RuntimeError(f"a sound log is refused: {error}") from None
            raise
        if how in WHOLE:
            found = [[(point.step, round(point.val_loss, 4)) for point in log.points] for log in logs]
            expected = [[(step, _loss(run, step)) for step in range(0, STEPS + 1, 5)] for run in range(runs)]
            assert found == expected, f"{found} is read, {expected} was written"
        return how


def _lines(run: int, dialect: tuple[str, str | None]) -> list[str]:
    """Of one run, evaluated at every fifth step."""
    evaluation, training = dialect
    lines = []
    for step in range(STEPS + 1):
        values = {"step": step, "before": step - 1, "total": STEPS, "loss": _loss(run, step), "time": 40 * step}
        if step and training:
            lines.append(training.format(**values))
        if step % 5 == 0:
            lines.append(evaluation.format(**values))
    return lines


def _loss(run: int, step: int) -> float:
    return round(11 - step / 9 + run / 1000, 4)
