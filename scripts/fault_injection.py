"""Kills and stops tiny training runs at random moments, resumes them, and checks that no run can tell.

    python scripts/fault_injection.py --kills 200 --terms 20 --workers 2

A run is started, killed with SIGKILL (or stopped with SIGTERM or SIGHUP) after a random delay, resumed, killed again,
until it is done; then the next one starts. Other processes lose their standard output, which is closed after such a
delay or lies on a full disk from the start, and must not mind. Afterwards every finished run must equal an undisturbed
one: the same records in metrics.jsonl but for times, as many lines in log.txt, parameters and optimiser bit by bit. A
kill must never cost a checkpoint: a resume that has to go back to an older one counts as a violation. Ends with status
1 on any violation.

Each process is forked from one that has imported everything and started nothing, so a start costs compilation (from a
shared cache) but no imports. Delays count from the start of a process, from the start of its training or from its first
save, and are drawn from --seed; where a kill lands in a run depends on the machine's speed.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grain  # noqa: F401  # imported once here rather than in every process
import jax
import numpy as np

from senano_jax import train
from senano_jax.config_file import read_config
from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home
from senano_jax.model.build import make_model
from senano_jax.optim.recipe import make_optimizer
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import DATA_AXIS, make_mesh
from senano_jax.training.state import abstract_state

RUN = (
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    "--batch-tokens=1024", "--seq-len=256", "--final-window-tokens=256", "--data.val-tokens=1024",
    "--data.val-seq-len=512", "--val-every=3", "--devices=1",
)  # fmt: skip
TIMES = ("step_ms", "tokens_per_s", "train_time_ms")
TRAINING = "run folder"  # in the line that a run prints when it is about to train
LIMIT_S = 300  # of one process
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}
FAULTS = (*SIGNALS, "closed", "full")  # the last two are those of standard output
COUNTED = {"kill": "kills", "term": "terms", "hup": "hups", "closed": "closed", "full": "full"}  # names of the counts


@dataclass
class Run:
    """One training run and the processes it took."""

    folder: Path
    flags: list[str]
    planned: str | None = None  # what the present process will suffer, one of FAULTS, or nothing
    delay: float = 0.0
    counted_from: str = "start"  # where the delay begins: "start", "training" or the first "save" of the process
    pid: int = 0
    starts: int = 0
    since: dict[str, float] = field(default_factory=dict)  # when the process came to each of these points
    saved_before: list[int] = field(default_factory=list)
    pipe: int | None = None  # to read from, if standard output will be closed
    printed: bytes = b""  # into it
    suffered: bool = False
    finished: bool = False
    violations: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder.with_suffix(f".{self.starts}.txt")

    def start(self) -> None:
        resume = (self.folder / "config.json").exists()  # before it is written there is nothing to resume
        self.starts, self.since, self.suffered = self.starts + 1, {"start": time.monotonic()}, False
        self.saved_before = self.checkpoints()
        flags = [*self.flags, f"--run-dir={self.folder}", *(["--resume"] if resume else [])]
        writing, self.printed = None, b""
        if self.planned == "closed":
            self.pipe, writing = os.pipe()
            os.set_blocking(self.pipe, False)
        elif self.planned == "full":
            writing, self.suffered = os.open("/dev/full", os.O_WRONLY), True
        self.pid = os.fork()
        if self.pid == 0:
            if self.pipe is not None:
                os.close(self.pipe)
            _be_a_training_process(flags, self.output, writing)
        if writing is not None:
            os.close(writing)

    def suffer(self) -> None:
        """Lets happen what is planned."""
        if self.planned in SIGNALS:
            os.kill(self.pid, SIGNALS[self.planned])
        else:
            self.close_pipe()
        self.suffered = True

    def close_pipe(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def look(self) -> None:
        """Notes which points the process has come to."""
        now = time.monotonic()
        if self.pipe is not None:
            with contextlib.suppress(BlockingIOError):
                self.printed += os.read(self.pipe, 1 << 16)
        if "training" not in self.since:
            if TRAINING in self.text():
                self.since["training"] = now
        elif "save" not in self.since and (self.in_a_save() or self.checkpoints() != self.saved_before):
            self.since["save"] = now

    def text(self) -> str:
        written = self.output.read_bytes() if self.output.exists() else b""
        return (self.printed + written).decode(errors="replace")

    def in_a_save(self) -> bool:
        return any((self.folder / "checkpoints").glob("*orbax-checkpoint-tmp*"))

    def checkpoints(self) -> list[int]:
        return [int(p.name) for p in (self.folder / "checkpoints").glob("*") if p.name.isdigit()]


def _be_a_training_process(flags: list[str], output: Path, standard_output: int | None) -> None:
    """Prints into `output`; into `standard_output` what belongs there, if it is given."""
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup has set for this script
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file if standard_output is None else standard_output, 1)
        os.dup2(file, 2)
        with one_line_errors(prints_result=False):
            train.main(flags)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Campaign:
    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder = args, folder
        self._random = random.Random(args.seed)
        self._flags = [*RUN, f"--steps={args.steps}", f"--compilation-cache={folder / 'xla'}"]
        self._left = Counter(asked(args))
        self._started = time.monotonic()
        self._runs: list[Run] = []
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._longest: dict[str, float] = {}  # delay after each point, from an undisturbed run

    def reference(self) -> Run:
        """Undisturbed runs: the first one compiles, the second one tells how long a run takes."""
        for name in ("compiling", "reference"):
            run = Run(self._folder / name, [*self._flags, "--checkpoint-every=1"])
            run.start()
            while not self._ended(run):
                time.sleep(0.005)
            if run.violations:
                sys.exit(f"error: an undisturbed run fails: {run.violations[0]}\n{run.text()}")
        times = [*run.since.values(), time.monotonic()]
        self._longest = {point: after - before for point, before, after in zip(run.since, times, times[1:])}
        return run

    def disturb(self) -> list[Run]:
        """Until all signals are used up, or the time is; then what was begun is finished."""
        slots: list[Run | None] = [None] * self._args.workers
        numbers = itertools.count()
        printed = 0.0
        while True:
            for slot, run in enumerate(slots):
                if run is None and self._signals_left():
                    number = next(numbers)
                    every = 1 + number % 2
                    run = Run(self._folder / f"run-{number}", [*self._flags, f"--checkpoint-every={every}"])
                    self._runs.append(run)
                    self._plan(run)
                    run.start()
                    slots[slot] = run
                elif run is not None and self._ended(run):
                    if run.finished or run.violations:
                        slots[slot] = None
                    else:
                        self._plan(run)
                        run.start()
            if not any(slots) and not self._signals_left():
                return self._runs
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                print(self.progress(), file=sys.stderr, flush=True)
            time.sleep(0.003)

    def progress(self) -> str:
        done = sum(run.finished for run in self._runs)
        bad = len(self.violations) + sum(len(run.violations) for run in self._runs)
        return (
            f"{time.monotonic() - self._started:.0f} s: {self.counts['kills']} kills "
            f"({self.counts['kills_inside_a_save']} inside a save), {self.counts['terms']} terms, "
            f"{self.counts['hups']} hups, {self.counts['closed']} closed, {self.counts['full']} full, "
            f"{done} of {len(self._runs)} runs finished, {bad} violations"
        )

    def _signals_left(self) -> bool:
        in_time = time.monotonic() - self._started < 60 * self._args.minutes
        return in_time and sum(self._left.values()) > 0

    def _plan(self, run: Run) -> None:
        """Draws what the next process of the run will suffer, and when."""
        run.planned = None
        if not self._signals_left():
            return
        run.planned = self._random.choices(list(self._left), list(self._left.values()))[0]
        self._left[run.planned] -= 1
        run.counted_from = self._random.choices(list(self._longest), (1, 1, 3))[0]
        run.delay = self._random.uniform(0, self._longest[run.counted_from])

    def _ended(self, run: Run) -> bool:
        """Signals the run's process when its time has come; once it has ended, judges it."""
        now = time.monotonic()
        run.look()
        since = run.since.get(run.counted_from)
        due = run.planned and not run.suffered and since is not None and now - since >= run.delay
        pid, status = os.waitpid(run.pid, os.WNOHANG)
        if pid == 0:
            if due:
                run.suffer()
            elif now - run.since["start"] > LIMIT_S:
                os.kill(run.pid, signal.SIGKILL)
                os.waitpid(run.pid, 0)
                run.violations.append(f"start {run.starts} did not end within {LIMIT_S} s")
                return True
            return False
        run.close_pipe()
        self._judge(run, os.waitstatus_to_exitcode(status))
        return True

    def _judge(self, run: Run, code: int) -> None:
        self.counts["processes"] += 1
        text = run.text()
        before_training = TRAINING not in text
        stopped = "stopped after step" in text
        if "going back" in text or "damaged" in text:
            run.violations.append(f"start {run.starts} found a damaged checkpoint: {text.strip()[:300]}")
        if run.planned and not run.suffered:
            self._left[run.planned] += 1  # it had ended before: drawn again
        if code == 0 and not stopped:
            run.finished = True
            if run.suffered and run.planned != "kill":
                self.counts[COUNTED[run.planned]] += 1
        elif run.suffered and run.planned == "kill" and code == -signal.SIGKILL:
            self.counts["kills"] += 1
            if not (run.folder / "config.json").exists():
                self.counts["kills_before_config_json"] += 1
            if before_training:
                self.counts["kills_before_training"] += 1
            if run.in_a_save():
                self.counts["kills_inside_a_save"] += 1
            if not run.checkpoints():
                self.counts["kills_before_the_first_checkpoint"] += 1
        elif run.suffered and run.planned in ("term", "hup") and code == 0:
            self.counts[COUNTED[run.planned]] += 1
            self.counts[COUNTED[run.planned] + "_saved"] += 1
            if run.in_a_save():
                run.violations.append(f"start {run.starts} left a save unfinished after {run.planned}")
        elif run.suffered and run.planned in ("term", "hup") and code == -SIGNALS[run.planned] and before_training:
            self.counts[COUNTED[run.planned]] += 1
            self.counts[COUNTED[run.planned] + "_before_training"] += 1
        else:
            run.violations.append(f"start {run.starts} ended with status {code}: {text.strip()[-500:]}")


def asked(args: argparse.Namespace) -> dict[str, int]:
    """How often each of FAULTS is to happen."""
    return {fault: getattr(args, COUNTED[fault]) for fault in FAULTS}


def compare(reference: Path, run: Path) -> list[str]:
    """What distinguishes a finished run from the undisturbed one."""
    faults = []
    expected, found = records(reference), records(run)
    if found != expected:
        step = next((a for a, b in zip(expected, found) if a != b), f"{len(found)} records of {len(expected)}")
        faults.append(f"metrics.jsonl differs: {step}")
    lines = [len((folder / "log.txt").read_text().splitlines()) for folder in (reference, run)]
    if lines[0] != lines[1]:
        faults.append(f"log.txt has {lines[1]} lines, not {lines[0]}")
    positions = [r["tokens_read"] for r in found if "loss" in r]
    if any(b - a != positions[0] for a, b in zip([0, *positions], positions)):
        faults.append(f"positions are not contiguous: {positions}")
    wanted, state = final_state(reference), final_state(run)
    if len(wanted) != len(state):
        faults.append("the final state has another structure")
    different = sum(a.tobytes() != b.tobytes() for a, b in zip(wanted, state))
    if different:
        faults.append(f"{different} of {len(wanted)} arrays of the final state differ")
    return faults


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def final_state(run: Path) -> list[np.ndarray]:
    config, _ = read_config(run / "config.json")
    abstract = abstract_state(
        make_model(config.model, config.dtype), make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    )
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(config.steps, abstract, make_mesh(1))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--hups", type=int, default=0)
    parser.add_argument("--closed", type=int, default=0, help="standard outputs to close")
    parser.add_argument("--full", type=int, default=0, help="standard outputs on a full disk")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="no new faults after this long")
    parser.add_argument("--json", type=expand_home, help="file for the result; printed in any case")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="fault-injection-"))
    campaign = Campaign(args, folder)
    reference = campaign.reference()
    runs = campaign.disturb()
    print(campaign.progress(), file=sys.stderr)
    for run in runs:
        faults = compare(reference.folder, run.folder) if run.finished else ["it did not finish"]
        campaign.violations += [f"{run.folder.name}: {fault}" for fault in [*run.violations, *faults]]
    result = {
        "seed": args.seed,
        "asked": {COUNTED[fault]: count for fault, count in asked(args).items()},
        "seconds": round(time.monotonic() - campaign._started),
        "runs": len(runs),
        "runs_equal_to_the_undisturbed_one": len(runs) - len({v.split(":")[0] for v in campaign.violations}),
        "records_compared": sum(len(records(run.folder)) for run in runs if run.finished),
        **{name: campaign.counts[name] for name in sorted(campaign.counts)},
        "violations": campaign.violations,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cpus": os.cpu_count(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    if not args.keep and not campaign.violations:
        shutil.rmtree(folder)
    elif campaign.violations:
        print(f"the runs are in {folder}", file=sys.stderr)
    sys.exit(1 if campaign.violations else 0)


if __name__ == "__main__":
    with one_line_errors():
        main()
