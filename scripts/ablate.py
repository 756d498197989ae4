"""Trains the variants of a study, each with several seeds and a complete schedule, and tables what they gain.

    python scripts/ablate.py run STUDY.toml --time-limit 3300   # one run on each GPU at a time, the longest first
    python scripts/ablate.py status STUDY.toml
    python scripts/ablate.py table STUDY.toml --write docs/studies.md
    python scripts/ablate.py plot STUDY.toml --image curves.png

What a study is: scripts/ablation/study.py. A run has the folder OUT/STUDY/VARIANT-seedK; beside it lie its output
(.txt), the configuration it was started with (.json) and, if it failed, why (.failed). `run` may end at any moment, by
its time limit, a signal or the end of the machine: the next one keeps what is finished and resumes what was begun. It
ends with status 1 if a run has failed; a failed one is not tried again without --retry.
"""

import argparse
import dataclasses
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import jax
from ablation import report
from ablation.results import read_results
from ablation.runner import Queue, devices, locked, progress, wait_for_earlier_jobs
from ablation.runs import failure, failure_file, finished_run, has_begun
from ablation.shards import unpacked
from ablation.study import Job, Study, read_study

from senano_jax.config import changed
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import require_tokens
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.plan import Plan
from senano_jax.runlog.plots import plot_image
from senano_jax.runlog.statistics import Sample
from senano_jax.runlog.tables import Table
from senano_jax.runlog.terminal import print_tables

IMAGES = (".png", ".svg")


def main(args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")  # of this process: the GPUs are for the jobs
    study = read_study(args.study)
    root = args.out / study.name
    commands = {"run": run, "status": status, "table": table, "plot": plot}
    return commands[args.command](args, study, root) or 0


def run(args: argparse.Namespace, study: Study, root: Path) -> int:
    """Works through the queue. Returns 1 if one of its runs has failed, now or before."""
    jobs = chosen(study, args.only)
    places = devices(args.gpus, args.per_gpu)
    with locked(root):
        wait_for_earlier_jobs(root, study.jobs, say)  # whichever: each has a device
        jobs = with_shards(jobs, args.unpack_to)
        for job in jobs if args.retry else ():
            failure_file(root, job).unlink(missing_ok=True)
        queue = Queue(study, root, jobs, places, args.time_limit, say)
        say(f"{study.name}: {queue.unfinished} of {len(jobs)} runs to do, {len(places)} at a time, in {root}")
        stopped = queue.run()
    outcome = f"{len(queue.done)} of {len(jobs)} runs finished"
    outcome += f", {len(queue.failed)} failed (--retry starts them again)" if queue.failed else ""
    if queue.unfinished:
        go_on = f"python scripts/ablate.py run {args.study} --out {args.out}"
        say(f"{stopped or 'the end'}: {outcome}, {queue.unfinished} left; go on with: {go_on}")
    else:
        say(f"{outcome}; the table: python scripts/ablate.py table {args.study} --out {args.out}")
    return 1 if queue.failed else 0


def status(args: argparse.Namespace, study: Study, root: Path) -> None:
    """Prints a line a run."""
    rows = []
    for job in study.jobs:
        finished = finished_run(root, job)
        if finished:
            rows.append((job.name, "finished", f"loss {finished.final.val_loss:.4f}"))
        elif (reason := failure(root, job)) is not None:
            rows.append((job.name, "failed", reason))
        elif has_begun(root, job):
            rows.append((job.name, "begun", progress(root, job).partition(" ")[2]))
        else:
            rows.append((job.name, "waiting", ""))
    print_tables([Table(study.name, ("run", "state", ""), tuple(rows))], [], figures=False)


def table(args: argparse.Namespace, study: Study, root: Path) -> None:
    """Prints the table, and writes it into a document and as JSON where these are named."""
    for flag, path in (("--write", args.write), ("--json", args.json)):
        check_output_file(flag, path)
    try:
        document = args.write.read_text(encoding="utf-8") if args.write and args.write.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--write {args.write} cannot be read ({error}); give a text in UTF-8") from None
    results = read_results(study, root)
    tables = [report.table(study, results), report.effects_table(results)]
    print_tables([each for each in tables if each], report.remarks(study, results))
    if args.json:
        write_atomically(args.json, report.to_json(study, results).encode())
    if args.write:
        write_atomically(args.write, report.fill(document, study, results).encode())


def plot(args: argparse.Namespace, study: Study, root: Path) -> None:
    """Draws loss against tokens and time, and the differences to the base, whose final loss is the target."""
    if args.image.suffix not in IMAGES:
        raise UserError(f"--image {args.image}: cannot write {args.image.suffix or 'this'}; use {', '.join(IMAGES)}")
    check_output_file("--image", args.image)
    groups = report.groups(study, root)
    target = Sample.of([run.final.val_loss for run in groups[0].runs]).mean
    write_atomically(args.image, plot_image(groups, round(target, 4), args.image.suffix[1:]))


def chosen(study: Study, only: str | None) -> list[Job]:
    """The jobs that --only names, by their variants or by the folders of single runs; or all."""
    if only is None:
        return list(study.jobs)
    found, variants = set(), [variant.name for variant in study.variants]
    for pattern in only.split(","):
        own = {job.name for job in study.jobs if fnmatchcase(job.variant, pattern) or fnmatchcase(job.name, pattern)}
        if not own:
            raise UserError(
                f"--only {pattern}: the variants are {', '.join(variants)}; a run is called as its folder, such as "
                f"{study.jobs[0].name}"
            )
        found |= own
    return [job for job in study.jobs if job.name in found]


def with_shards(jobs: list[Job], unpack_to: Path | None) -> list[Job]:
    """The jobs, reading unpacked shards. Raises UserError if there are none, or too few for a run."""
    data = {"data.train_files": jobs[0].config.data.train_files, "data.val_files": jobs[0].config.data.val_files}
    data = {path: unpacked(pattern, unpack_to, say) for path, pattern in data.items()}
    find_shards(data["data.val_files"])
    train_shards = find_shards(data["data.train_files"])
    for plan in [Plan(job.config) for job in jobs]:
        require_tokens(data["data.train_files"], train_shards, plan.stream_tokens, plan.longest_sequence)
    return [dataclasses.replace(job, config=changed(job.config, data)) for job in jobs]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("study", type=expand_home, help="file of the study")
    shared.add_argument(
        "--out",
        type=expand_home,
        default=Path("logs/ablations"),
        help="folder of the studies' folders (default: %(default)s)",
    )
    runs = commands.add_parser("run", parents=[shared], help="train what is left")
    runs.add_argument("--gpus", type=positive, help="GPUs to use (default: all), or processes where there is none (1)")
    runs.add_argument(
        "--per-gpu",
        type=positive,
        default=1,
        metavar="N",
        help="runs on each GPU at a time: one trains while another compiles or evaluates (default: %(default)s)",
    )
    runs.add_argument(
        "--only",
        metavar="NAME,...",
        help="variants, runs, or patterns of them such as factors-*, to train (default: all)",
    )
    runs.add_argument("--time-limit", type=positive, metavar="SECONDS", help="save and end after so long")
    runs.add_argument(
        "--unpack-to", type=expand_home, metavar="DIR", help="folder for shards given as .bin.xz (default: theirs)"
    )
    runs.add_argument("--retry", action="store_true", help="start failed runs again")
    commands.add_parser("status", parents=[shared], help="a line for each run")
    tables = commands.add_parser("table", parents=[shared], help="what is finished, beside the base")
    tables.add_argument("--write", type=expand_home, metavar="FILE", help="Markdown document to write it into as well")
    tables.add_argument("--json", type=expand_home, metavar="FILE", help="file for the figures, exact")
    plots = commands.add_parser("plot", parents=[shared], help="curves, and differences to the base")
    plots.add_argument("--image", type=expand_home, required=True, metavar="FILE", help="FILE.png or FILE.svg")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    arguments = parse_arguments()
    with one_line_errors(prints_result=arguments.command != "run"):
        sys.exit(main(arguments))
