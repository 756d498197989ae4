"""Feeds damaged and hostile files to everything that reads one, and checks that each is read or refused in one line.

    python scripts/fuzz_inputs.py --inputs 10000

Kinds: shards, config.json, our run folders, PyTorch logs, .pt files, checkpoint folders. An input must end in a valid
read or a UserError of one line; never in another exception, in more than --seconds, in memory beyond --gigabytes above
what was used at the start, or in the execution of code (a pickle that makes a file). Seeded; ends with status 1 on any
violation, which the JSON names with the number that `--only` repeats.
"""

import argparse
import contextlib
import json
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

from senano_jax.config import check_config
from senano_jax.config_file import read_config, write_config
from senano_jax.data.shards import HEADER_BYTES, Shard, check_tokens, find_shards, open_shard, write_shard
from senano_jax.data.stream import SequenceSource
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import read_torch_checkpoint
from senano_jax.presets import demo
from senano_jax.runlog.reader import read_log
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import make_mesh
from senano_jax.training.state import TrainState

SHARES = {
    "shard": 0.25,
    "config": 0.25,
    "run_folder": 0.2,
    "torch_log": 0.15,
    "torch_checkpoint": 0.1,
    "checkpoint": 0.05,
}
HUGE = (2**31 - 1, -(2**31), 2**32, 2**63 - 1, -1, 0, 10**30, 10**400, 1e308, float("nan"), float("inf"))
WRONG = (
    None,
    True,
    False,
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    [],
    [1],
    {},
    {"a": {}},
    1.5,
    *HUGE,
)
NAMES = ("../escape", "/tmp/escape", "a/../../b", "a\0b", "x" * 300, "\ud800", "-rf", "*", "**/" * 50, "~root")


class TooLong(BaseException):
    """Not an Exception: no reader may swallow it."""


class Fuzzer:
    """Makes input `number` of a kind and reads it; each has random numbers of its own."""

    def __init__(self, folder: Path):
        self.folder, self.canary = folder, folder / "canary"
        self.seeds = folder / "seeds"
        self.seeds.mkdir()
        write_shard(self.seeds / "shard.bin", np.arange(3000))
        write_config(self.seeds / "config.json", demo(), "demo", 1)
        self._write_log_seeds()
        torch.save(
            {"model": {f"blocks.{n}.weight": torch.randn(8, 8) for n in range(3)}, "step": 3}, self.seeds / "new.pt"
        )
        torch.save({"embed": torch.randn(8, 8).bfloat16()}, self.seeds / "old.pt", _use_new_zipfile_serialization=False)
        self.state = TrainState(
            np.int32(1), {"a": np.ones((4, 8), np.float32), "b": np.ones(3, np.float32)}, {"m": np.ones(5, np.float32)}
        )
        self.state = jax.device_put(self.state)
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state)
        with Checkpoints(self.seeds / "checkpoints") as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, self.state, {"step": step, "next_token": 7, "evaluated": True}, 3.0 + step)

    def _write_log_seeds(self) -> None:
        ours, theirs = (
            [],
            ["import torch\n", "print(f'step:{step}/{steps} val_loss:{val_loss:.4f}')\n", "=" * 80 + "\n"],
        )
        for step in range(11):
            if step:
                ours.append(
                    {"step": step, "tokens_trained": 4096 * step, "tokens_read": 4096 * step, "loss": 11.0 - step / 9}
                )
                theirs.append(f"step:{step}/10 train_time:{40 * step}ms step_avg:40.00ms\n")
            if step % 5 == 0:
                point = {
                    "step": step,
                    "tokens_trained": 4096 * step,
                    "val_loss": 11.0 - step / 9,
                    "train_time_ms": 40.0 * step,
                }
                ours.append(point)
                theirs.append(
                    f"step:{step}/10 val_loss:{11 - step / 9:.4f} train_time:{40 * step}ms tokens:{step}.00M\n"
                )
        (self.seeds / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
        (self.seeds / "torch.txt").write_text("".join(theirs))

    def run(self, kind: str, rng: random.Random) -> str:
        """The name of the damage that was done. Raises whatever the reader raises."""
        place = self.folder / "input"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return getattr(self, "_" + kind)(rng, place)

    def _shard(self, rng: random.Random, place: Path) -> str:
        content = bytearray((self.seeds / "shard.bin").read_bytes())
        how = rng.choice(["bytes", "header", "shrinks", "name", "link"])
        path = place / "a.bin"
        if how == "bytes":
            content = damaged(rng, content)
        elif how == "header":
            at = 4 * rng.randrange(4)
            content[at : at + 4] = rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), 20240520, 3000, 2999]).to_bytes(
                4, "little", signed=True
            )
        path.write_bytes(content)
        if how == "link":
            path = place / "link.bin"
            path.symlink_to(
                rng.choice(["/dev/zero", "/etc/passwd", "/proc/self/mem", str(path), "link.bin", "../nowhere", "/"])
            )
        if how == "name":
            path = rng.choice(NAMES)
            with contextlib.suppress(UserError):
                find_shards(str(place / path) if rng.random() < 0.5 else str(place / "*" / path))
        try:
            check_tokens(path, open_shard(path), 0)
        finally:
            tokens = Shard(path)
            if how == "shrinks":
                os.truncate(path, rng.randrange(HEADER_BYTES + 6000))
            tokens.read(0, len(tokens))
            SequenceSource([path], rng.choice([1, 128, 5000]))[0]
        return how

    def _config(self, rng: random.Random, place: Path) -> str:
        content = (self.seeds / "config.json").read_bytes()
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

    def _run_folder(self, rng: random.Random, place: Path) -> str:
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(self.seeds / name, place / name)
        config = json.loads((place / "config.json").read_text()) | {"steps": 10}
        (place / "config.json").write_text(json.dumps(config))
        (place / "environment.json").write_text('{"devices": [{"kind": "cpu"}]}')
        (place / "log.txt").write_text("step:0/10\n")
        name = rng.choice(["config.json", "metrics.jsonl", "metrics.jsonl", "metrics.jsonl", "environment.json"])
        path = place / name
        how = rng.choice(["bytes", "value", "deep", "link", "gone", "folder", "lines"])
        if how == "bytes":
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif how == "value":
            lines = path.read_text().splitlines() if name == "metrics.jsonl" else [path.read_text()]
            at = rng.randrange(len(lines))
            document = json.loads(lines[at])
            change(rng, document)
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
        return how

    def _torch_log(self, rng: random.Random, place: Path) -> str:
        content = (self.seeds / "torch.txt").read_bytes()
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
        read_log(rng.choice(NAMES) if how == "name" else path, tokens_per_step=rng.choice([None, 4096]))
        return how

    def _torch_checkpoint(self, rng: random.Random, place: Path) -> str:
        content = (self.seeds / rng.choice(["new.pt", "old.pt"])).read_bytes()
        path = place / "a.pt"
        how = rng.choice(["bytes", "bytes", "code", "content", "bomb", "member", "name", "link"])
        if how == "bytes":
            path.write_bytes(damaged(rng, content))
        elif how == "code":
            trap = Trap(rng.choice(["open", "eval", "system"]), str(self.canary))
            if rng.random() < 0.3:
                path.write_bytes(pickle.dumps(trap, protocol=rng.choice([0, 2, 4])))
            else:
                content = rng.choice(
                    [trap, {"model": {"a": torch.zeros(2)}, "optimizer": trap}, {"model": trap}, {trap: 1}]
                )
                torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
        elif how == "content":
            torch.save({"model": rng.choice(odd_contents()), "step": 1}, path)
        elif how in ("bomb", "member"):
            with zipfile.ZipFile(self.seeds / "new.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
                chosen = rng.choice(old.namelist())
                for name in old.namelist():
                    data = old.read(name)
                    if name == chosen and how == "bomb":
                        data = bytes(1 << 26)
                    elif name == chosen:
                        name, data = rng.choice([f"../{name}", f"/{name}", name + "x"]), bytes(damaged(rng, data))
                    new.writestr(name, data)
        elif how == "link":
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "a.pt", "/", "/etc/passwd"]))
        read_torch_checkpoint(rng.choice(NAMES) if how == "name" else str(path))
        return how

    def _checkpoint(self, rng: random.Random, place: Path) -> str:
        folder = place / "checkpoints"
        shutil.copytree(self.seeds / "checkpoints", folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        path = rng.choice(files)
        how = rng.choice(["bytes", "bytes", "bytes", "gone", "link", "deep", "folder gone", "folder named"])
        if how == "bytes":
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif how == "deep":
            path.write_bytes(deep(rng))
        elif how == "folder gone":
            shutil.rmtree(path.parent)
        elif how == "folder named":
            (folder / rng.choice(["99", "-1", "1e3", "007", "9" * 30, "8.orbax-checkpoint-tmp", "x"])).mkdir()
        else:
            path.unlink()
            if how == "link":
                path.symlink_to(rng.choice(["/dev/null", "/etc/passwd", path.name, "../..", "/"]))
        with Checkpoints(folder, read_only=rng.random() < 0.5) as checkpoints:
            steps = checkpoints.steps()
            for step in steps:
                restored, record = checkpoints.restore(step, self.abstract, make_mesh(1))
                same = jax.tree.map(
                    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored, self.state
                )
                if not all(jax.tree.leaves(same)) or record["step"] != step or record["next_token"] != 7:
                    raise AssertionError("damage was not noticed")
        return how


class Trap:
    """Unpickled by a careless reader, it would make the canary file."""

    def __init__(self, how: str, canary: str):
        self.how, self.canary = how, canary

    def __reduce__(self):
        return {
            "open": (open, (self.canary, "w")),
            "eval": (eval, (f"open({self.canary!r}, 'w')",)),
            "system": (os.system, (f"touch {self.canary}",)),
        }[self.how]


def odd_contents() -> list:
    huge = torch.zeros(1)
    return [
        {"a": torch.nn.Parameter(torch.zeros(3))},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"a": huge.expand(1 << 40)},
        {"a": huge.bfloat16().expand(1 << 40)},
        {"a": torch.zeros(3, dtype=torch.complex64)},
        {"a": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(3).int()},
        {("x",) * 3: torch.zeros(1)},
        {"x" * 100_000: 1},
        {"a\nb": 1},
        {"a": {"b": torch.zeros(1)}},
        {},
        [torch.zeros(1)],
        None,
    ]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut, with bits flipped, with a piece replaced, repeated or removed, or something else altogether."""
    content, at = bytearray(content), rng.randrange(max(len(content), 1))
    piece = slice(at, at + rng.choice([1, 4, 64, 1024]))
    how = rng.randrange(7)
    if how == 0:
        del content[at:]
    elif how == 1 and content:
        for _ in range(rng.choice([1, 1, 2, 30])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 2:
        content[piece] = rng.randbytes(len(content[piece]))
    elif how == 3:
        content[piece] = bytes(len(content[piece]))
    elif how == 4:
        content[at:at] = content[piece] * rng.choice([1, 50])
    elif how == 5:
        del content[piece]
    else:
        content = bytearray(
            rng.choice([b"", b"\0" * 5000, b"\xff\xfe", b"PK\x03\x04", b"\x80\x02.", rng.randbytes(2000)])
        )
    return bytes(content)


def deep(rng: random.Random) -> bytes:
    depth = rng.choice([100, 3000, 300_000])
    return rng.choice([b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])


def change(rng: random.Random, document: object) -> None:
    """Replaces, renames, adds or removes one value somewhere in a JSON document."""
    while isinstance(document, dict) and document:
        key = rng.choice(sorted(document))
        if isinstance(document[key], dict) and document[key] and rng.random() < 0.7:
            document = document[key]
            continue
        how = rng.random()
        if how < 0.8:
            document[key] = rng.choice(WRONG)
        elif how < 0.9:
            del document[key]
        else:
            document[rng.choice(["extra", "", "__class__", "../x"])] = rng.choice(WRONG)
        return


def try_one(fuzzer: Fuzzer, kind: str, seed: str, seconds: int, read: Callable) -> tuple[str, str | None]:
    """ "read" or "refused", and what was wrong with the way it ended."""
    signal.alarm(seconds)
    try:
        read(kind, random.Random(seed))
        outcome, fault = "read", None
    except UserError as error:
        outcome = "refused"
        fault = "the message has several lines" if "\n" in str(error) else None
        fault = fault or (f"the message has {len(str(error))} characters" if len(str(error)) > 2000 else None)
    except TooLong:
        outcome, fault = "failed", f"it took more than {seconds} s"
    except BaseException as error:
        outcome, fault = "failed", f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
    if fuzzer.canary.exists():
        fuzzer.canary.unlink()
        outcome, fault = "failed", "it executed code"
    return outcome, fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND-NUMBER", help="repeats one input and lets its exception through")
    parser.add_argument("--seconds", type=int, default=20, help="alarm for one input")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="address space beyond that at the start")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = Fuzzer(folder)
    if args.only:
        kind, number = args.only.rsplit("-", 1)
        print(fuzzer.run(kind, random.Random(f"{args.seed}-{kind}-{number}")))
        return

    def too_long(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(args.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: dict[str, Counter] = {}
    violations, started, printed = [], time.monotonic(), 0.0
    for kind in args.kinds:
        total = round(args.inputs * SHARES[kind])
        counts[kind] = Counter()
        for number in range(total):
            outcome, fault = try_one(fuzzer, kind, f"{args.seed}-{kind}-{number}", args.seconds, fuzzer.run)
            counts[kind][outcome] += 1
            if fault:
                violations.append(f"{kind}-{number}: {fault}")
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                print(f"{kind} {number + 1}/{total}, {len(violations)} violations", file=sys.stderr, flush=True)
    result = {
        "seed": args.seed,
        "inputs": sum(sum(c.values()) for c in counts.values()),
        "kinds": counts,
        "seconds": round(time.monotonic() - started),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "violations": violations,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
