"""Feeds damaged and hostile files to everything that reads one, and checks that each is read or refused in one line.

    python scripts/fuzz_inputs.py --inputs 10000

Kinds: shards, config.json, our run folders, text logs, .pt and .safetensors files, checkpoint folders. An input must
end in a valid read or a UserError of one line; never in another exception, in more than --seconds, in memory beyond
--gigabytes above what was used at the start, or in the execution of code (a pickle that makes a file). Seeded; ends
with status 1 on any violation, which the JSON names with the number that `--only` repeats.
"""

import argparse
import json
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

try:
    import torch
except ImportError:
    sys.exit("error: PyTorch is missing, whose files are among the inputs; run pip install -e '.[torch]'")
from fuzz.checkpoints import CheckpointFolders
from fuzz.configs import Configs
from fuzz.logs import RunFolders, TorchLogs
from fuzz.safetensors_files import SafetensorsFiles
from fuzz.shards import Shards
from fuzz.torch_checkpoints import CANARY, TorchCheckpoints

from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home

# Each with its share of the inputs.
KINDS = {
    "shard": (0.25, Shards),
    "config": (0.2, Configs),
    "run_folder": (0.2, RunFolders),
    "torch_log": (0.15, TorchLogs),
    "torch_checkpoint": (0.1, TorchCheckpoints),
    "safetensors": (0.05, SafetensorsFiles),
    "checkpoint": (0.05, CheckpointFolders),
}


class TooLong(BaseException):
    """Not an Exception: no reader may swallow it."""


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def try_one(read: Callable, rng: random.Random, folder: Path, seconds: int) -> tuple[str, str | None]:
    """How it ended, read, refused or failed; and what was wrong with that."""
    place, canary = empty(folder / "input"), folder / "seeds" / CANARY
    signal.alarm(seconds)
    try:
        read(rng, place)
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
    if canary.exists():
        canary.unlink()
        outcome, fault = "failed", "it executed code"
    return outcome, fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND-NUMBER", help="repeats one input and lets its exception through")
    parser.add_argument("--seconds", type=int, default=20, help="alarm for one input")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="address space beyond that at the start")
    parser.add_argument("--json", type=expand_home)
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "seeds").mkdir()
    readers = {kind: make(folder / "seeds") for kind, (_, make) in KINDS.items()}
    if args.only:
        kind, number = args.only.rsplit("-", 1)
        print(readers[kind](random.Random(f"{args.seed}-{kind}-{number}"), empty(folder / "input")))
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
        total = round(args.inputs * KINDS[kind][0])
        counts[kind] = Counter()
        for number in range(total):
            rng = random.Random(f"{args.seed}-{kind}-{number}")
            outcome, fault = try_one(readers[kind], rng, folder, args.seconds)
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
    with one_line_errors():
        main()
