"""Writes the tables of README.md and docs/ that are made from data: the records, JAX beside PyTorch on the same tokens,
and what each command `python -m senano_jax.compare` gives.

    python scripts/records.py            # rewrites what is between the markers
    python scripts/records.py --check    # status 1 if the texts and the data disagree

The data are the published figures (senano_jax/runlog/published/records.json) and logs/. A run of ours is a record if
it keeps the rules on loss, order, data and (rounded) parameters: `python -m senano_jax.rules` says which it keeps.
Runs logs/SYSTEM-GPU-200-steps-seedK/ stand beside PyTorch logs logs/torch-SYSTEM-GPU-200-steps-seedK.txt; GPU is h100
or h200, which one a program ran on makes no difference to its losses but that of rounding.
"""

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from senano_jax import compare
from senano_jax.config_file import read_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home, write_atomically
from senano_jax.runlog import published
from senano_jax.runlog.curves import SAME_TOKENS, RunLog
from senano_jax.runlog.data_record import read_data
from senano_jax.runlog.reader import read_log, read_logs
from senano_jax.runlog.statistics import Sample, welch_test
from senano_jax.runlog.tables import Table, to_markdown
from senano_jax.runlog.track_rules import fineweb_rule, loss_rule, order_rule, parameter_rules
from senano_jax.runlog.units import format_time, format_tokens

ROOT = Path(__file__).resolve().parent.parent
TABLE_LINK = "[record table]: https://github.com/lapp0/sample-efficient-nanogpt#world-record-history"
NONE_YET = """\
**Not verified here:** a full FineWeb run of this JAX program. No claim is made that it reaches 3.28 until the log of
such a run is in `logs/`. What is verified is below."""
UNNAMED_RUN = re.compile(r".+-20\d{6}-\d{6}-[0-9a-f]{4}")  # a name that train made up; git ignores these folders
COMPARISON = re.compile(r"(?P<torch>torch-)?(?P<system>.+)-h[12]00-200-steps-seed-?\w+(?(torch)\.txt)")
INTRODUCTION = """\
Both programs on the same tokens in the same order: 200 steps of 393,216 tokens on one H100 or H200, English text in
shards of the same format (not FineWeb); the PyTorch loader was mended so that it skips none. Validation loss, mean ±
deviation over seeds, and how often equal programs would differ by as much (Welch's test):"""
# A command, its arguments on lines that end in a backslash, and after it the block that is written here.
COMMAND = re.compile(r"^ {4}python -m senano_jax\.compare (?P<arguments>(?:.*\\\n)*.*)\n", re.MULTILINE)
FIGURES = "\n<!-- figures: written by scripts/records.py -->\n", "<!-- end of figures -->"
BOUND, FINAL_BOUND = 0.05, 0.008  # on the difference of mean losses, before the last step and at it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with status 1 if README.md would be")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and logs (default: %(default)s)")
    args = parser.parse_args()
    with one_line_errors():
        root = expand_home(args.root)
        readme = root / "README.md"
        if not readme.is_file():
            raise UserError(f"{readme}: no such file; give --root the folder of README.md and logs")
        for path in (readme, *sorted(root.glob("docs/*.md"))):
            try:
                written = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read ({error}); restore it") from None
            generated = fill(fill_figures(written, root), path.name, root / "logs")
            if args.check and generated != written:
                print(f"error: {path} differs from its data: run python scripts/records.py", file=sys.stderr)
                sys.exit(1)
            if not args.check and generated != written:
                write_atomically(path, generated.encode())


def fill(text: str, file_name: str, logs: Path) -> str:
    """The text of a file with its generated block renewed, if it is to have one. Raises UserError for missing markers
    or damaged logs."""
    if file_name not in BLOCKS:
        return text
    name, block_of = BLOCKS[file_name]
    begin, end = f"<!-- {name}: written by scripts/records.py -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise UserError(f"{file_name} has no line {begin.strip()} with {end} after it; put them where the table goes")
    return before + begin + block_of(logs) + end + after


def fill_figures(text: str, root: Path) -> str:
    """The text with the block after each command renewed; a command without one, or of which `root` has no log, is left
    as it is. Raises UserError for a block without end and for damaged logs."""
    begin, end = FIGURES
    done = ""
    while command := COMMAND.search(text):
        done, text = done + text[: command.end()], text[command.end() :]
        if text.startswith(begin):
            block, found, rest = text.removeprefix(begin).partition(end)
            if not found:
                raise UserError(f"the figures of {command[0].strip()!r} have no end; put {end} after them")
            done, text = done + begin + (figures(command["arguments"], root) or block) + end, rest
    return done + text


def figures(command_line: str, root: Path) -> str | None:
    """The first table and the remarks of `compare`, as a block of Markdown; None if `root` has no logs for it."""
    words = shlex.split(command_line.replace("\\\n", " "))
    arguments = tyro.cli(compare.Arguments, args=words)
    with contextlib.chdir(root):
        try:
            groups = compare.read_groups(arguments.logs, arguments.tokens_per_step)
        except UserError:
            if any(Path("logs").glob("torch-*")) or any(Path("logs").glob("*/config.json")):
                raise
            return None
    rows, remarks = compare.figures(groups, arguments.target)
    table = to_markdown(compare.comparison_tables(rows, arguments.target)[0])
    return "\n\n".join([table, *([". ".join(remarks) + "."] if remarks else [])]) + "\n"


def records_block(logs: Path) -> str:
    """The record table, the fewest tokens last."""
    known = json.loads(Path(published.__file__).with_name("records.json").read_text())
    rows = [(entry["tokens"], published_row(entry)) for entry in known]
    own = [(run.tokens_trained, own_row(run, folder)) for folder in run_folders(logs) if (run := record_of(folder))]
    rows = [row for _, row in sorted(rows + own, key=lambda pair: -pair[0])]
    headers = ("system", "by", "parameters", "tokens", "validation loss", "hardware and time", "source")
    table = to_markdown(Table("", headers, tuple(rows))).replace("---:", "---")  # words, not figures
    return "\n\n".join([table, *([] if own else [NONE_YET]), TABLE_LINK]) + "\n"


def published_row(entry: dict) -> tuple[str, ...]:
    note, log = entry["parameters_note"], entry["log"]
    return (
        f"`{entry['preset']}`",
        entry["by"],
        f"{entry['parameters']:,}" + (f" ({note})" if note else ""),
        format_tokens(entry["tokens"]),
        "not published" if entry["val_loss"] is None else f"{entry['val_loss']:g}",
        entry["cost"] or "-",
        f"[record table], {entry['date']}" + (f", [log]({log})" if log else ""),
    )


def own_row(run: RunLog, folder: Path) -> tuple[str, ...]:
    return (
        f"`{run.name}`",
        "this program (JAX)",
        "-" if run.parameters is None else f"{run.parameters:,}",
        format_tokens(run.tokens_trained),
        f"{run.final.val_loss:.4f}",
        f"{run.hardware}, {format_time(run.final.train_time_ms or 0)}",
        f"[log](logs/{folder.name}/)",
    )


def run_folders(logs: Path) -> list[Path]:
    return sorted(path.parent for path in logs.glob("*/config.json") if not UNNAMED_RUN.fullmatch(path.parent.name))


def record_of(folder: Path) -> RunLog | None:
    """The run in `folder`, if it belongs into the record table; None too if it cannot be read."""
    try:
        config, run, data = read_config(folder / "config.json")[0], read_log(folder), read_data(folder)
    except UserError:
        return None
    verdicts = (loss_rule(config, run), order_rule(config, run, data), fineweb_rule(data))
    if any(verdict.status != "pass" for verdict in verdicts) or parameter_rules(config, run)[0].status != "pass":
        return None
    return run


def same_tokens_block(logs: Path) -> str:
    """For each system that both programs trained: mean ± sd of the loss at each evaluation, and their differences."""
    systems = compared_systems(logs)
    if not systems:
        return ""
    tokens = tokens_of_steps([run for sides in systems.values() for side in sides.values() for run in side])
    bounds = dict.fromkeys(tokens, BOUND) | {max(tokens): FINAL_BOUND}
    rows, broken, diverged = [], [], []
    for system, sides in systems.items():
        diverged += [f"{system} by {by}" for by, side in sides.items() for run in side if run.diverged]
        sides = {by: [run for run in side if not run.diverged] for by, side in sides.items()}
        torch, jax = ([losses_at(side, step) for step in tokens] for side in sides.values())
        for (by, side), losses in zip(sides.items(), (torch, jax)):
            trained = format_tokens(max((run.final.tokens for run in side), default=0))
            rows.append((f"`{system}`", by, str(len(side)), trained, *(loss_cell(loss, len(side)) for loss in losses)))
        differences = [b.mean - a.mean if a and b else None for a, b in zip(torch, jax)]
        rows.append((f"`{system}`", "JAX - PyTorch", "", "", *("-" if d is None else f"{d:+.4f}" for d in differences)))
        tests = [welch_test(a, b) if a and b else None for a, b in zip(torch, jax)]
        rows.append((f"`{system}`", "Welch's p", "", "", *("-" if test is None else f"{test.p:.2f}" for test in tests)))
        broken += [f"{system} at step {k}" for k, d in zip(tokens, differences) if d is not None and abs(d) > bounds[k]]
    table = Table("", ("system", "by", "seeds", "tokens", *(f"step {step}" for step in tokens)), tuple(rows))
    within = f"{FINAL_BOUND} at step {max(tokens)} and {BOUND} before"
    verdict = f"Not within {within}: {', '.join(broken)}." if broken else f"All differences are within {within}."
    lost = [f"Left out, because they diverged: {', '.join(diverged)}."] if diverged else []
    return "\n\n".join([INTRODUCTION, to_markdown(table), verdict, *lost]) + "\n"


def compared_systems(logs: Path) -> dict[str, dict[str, list[RunLog]]]:
    """The runs {"PyTorch": [...], "JAX": [...]} of each system that has both."""
    systems: dict[str, dict[str, list[RunLog]]] = {}
    for path in sorted(logs.glob("*")):
        if match := COMPARISON.fullmatch(path.name):
            sides = systems.setdefault(match["system"], {"PyTorch": [], "JAX": []})
            sides["PyTorch" if match["torch"] else "JAX"] += read_logs(path)
    return {system: sides for system, sides in systems.items() if all(sides.values())}


def tokens_of_steps(runs: Sequence[RunLog]) -> dict[int, int]:
    """Tokens trained on at each step that one of the runs was evaluated at, but the start, in order.

    Raises UserError if a step does not mean the same tokens in all of them.
    """
    tokens: dict[int, int] = {}
    for run in runs:
        for point in run.points:
            known = tokens.setdefault(point.step, point.tokens)
            if abs(point.tokens - known) > SAME_TOKENS * known:
                raise UserError(
                    f"{run.name} ({run.implementation}) has {point.tokens:,} tokens at step {point.step}, another run "
                    f"{known:,}; compare runs of one batch size"
                )
    return {step: tokens[step] for step in sorted(tokens) if step}


def losses_at(runs: Sequence[RunLog], step: int) -> Sample | None:
    """Over the seeds that were evaluated there; None where none was."""
    losses = [point.val_loss for run in runs for point in run.points if point.step == step]
    return Sample.of(losses) if losses else None


def loss_cell(sample: Sample | None, seeds: int) -> str:
    if sample is None:
        return "-"
    spread = "" if sample.sd is None else f" ± {sample.sd:.4f}"
    return f"{sample.mean:.4f}{spread}" + (f" (n={sample.n})" if sample.n < seeds else "")


BLOCKS = {"README.md": ("records", records_block), "parity.md": ("same-tokens", same_tokens_block)}


if __name__ == "__main__":
    main()
