"""Which faults happen to which runs, and when; what each process made of its own."""

import argparse
import itertools
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from faults.process import COUNTED, FAULTS, SIGNALS, TRAINING, Run

RUN = (
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    "--batch-tokens=1024", "--seq-len=256", "--final-window-tokens=256", "--data.val-tokens=1024",
    "--data.val-seq-len=512", "--val-every=3", "--devices=1",
)  # fmt: skip
LIMIT_S = 300  # of one process


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

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

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
            f"{self.seconds:.0f} s: {self.counts['kills']} kills "
            f"({self.counts['kills_inside_a_save']} inside a save), {self.counts['terms']} terms, "
            f"{self.counts['hups']} hups, {self.counts['closed']} closed, {self.counts['full']} full, "
            f"{done} of {len(self._runs)} runs finished, {bad} violations"
        )

    def _signals_left(self) -> bool:
        in_time = self.seconds < 60 * self._args.minutes
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
