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
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import jax
from faults.campaign import Campaign, asked
from faults.comparison import compare, records
from faults.process import COUNTED

from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home


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
        "seconds": round(campaign.seconds),
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
