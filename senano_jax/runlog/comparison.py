"""Which runs belong together, and the figures of each group of them beside the first."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from senano_jax.errors import UserError
from senano_jax.runlog.comparability import other_schedule, other_validation
from senano_jax.runlog.curves import SAME_TOKENS, RunLog, loss_at, tokens_to_loss
from senano_jax.runlog.log_arguments import split_argument
from senano_jax.runlog.reader import read_logs
from senano_jax.runlog.statistics import Sample, WelchTest, p_mean_below, welch_test


@dataclass(frozen=True)
class Group:
    """One system: a run, or several seeds of one configuration."""

    name: str
    runs: tuple[RunLog, ...]


@dataclass(frozen=True)
class Row:
    """The figures of one group. Means are over its complete runs, or over all if none is complete; runs that diverged
    are left out unless all did."""

    name: str
    implementation: str
    hardware: str | None
    parameters: int | None
    steps: int | None
    n: int
    """Runs the means are over."""
    complete: bool
    tokens_trained: float
    tokens_read: float | None
    final_loss: Sample | None
    """None if all runs diverged."""
    reached: int
    """Runs of the `n` that came down to the target."""
    tokens_to_target: Sample | None
    """None unless all did."""
    train_time_ms: float | None
    tokens_per_s: float | None
    p_below_target: float | None
    """One-sided p-value that the true mean is below the target."""
    # Against the first group; None for the first group itself and where there is nothing to compare.
    tokens_saved: float | None
    saved_fraction: float | None
    final_loss_test: WelchTest | None
    common_tokens: float | None
    """The last token count that all runs of both groups reached."""
    difference_at_common: float | None
    """Mean loss there, minus the first group's."""
    comparable: bool = True
    """False if validation text or schedules are known to differ so much that nothing is said to be saved."""
    caution: str | None = None
    """How they are known to differ."""


def read_groups(arguments: Sequence[str], tokens_per_step: int | None) -> list[Group]:
    """Reads `LOG` and `NAME=LOG,LOG` arguments. Runs of ours with one configuration join into a group by themselves,
    and so do the runs of one file. Groups of which all runs diverged come last: nothing can be held against them.

    Raises UserError for a log that is damaged or named twice, and for a name that is used twice.
    """
    entries: dict[tuple[str | None, str], list[RunLog]] = {}
    seen: set[str] = set()
    for argument in arguments:
        name, sources = split_argument(argument)
        if (name, "") in entries:
            raise UserError(f"{argument}: the name {name!r} is used twice; write {name}=LOG,LOG for one group")
        for source in sources:
            if source.identity in seen:
                raise UserError(f"{source.path} is given twice, which would count as two seeds; give each log once")
            seen.add(source.identity)
            for run in read_logs(source.path, tokens_per_step=tokens_per_step, batch=source.batch):
                entries.setdefault((name, "" if name else run.group_key), []).append(run)
    groups = _named_groups([(name, tuple(runs)) for (name, _), runs in entries.items()])
    return sorted(groups, key=lambda group: all(run.diverged for run in group.runs))


def compare(groups: Sequence[Group], target: float) -> list[Row]:
    """One row a group, in order; the first one is what the others are held against."""
    rows: list[Row] = []
    for group in groups:
        first = groups[0] if rows else None
        rows.append(_row(group, target, first, rows[0] if rows else None))
    return rows


def complete_runs(group: Group) -> tuple[RunLog, ...]:
    """The runs whose last evaluation is the final one; if none is, all that did not diverge; if all did, those."""
    sound = tuple(run for run in group.runs if not run.diverged)
    return tuple(run for run in sound if run.complete) or sound or group.runs


def cautions(rows: Sequence[Row]) -> list[str]:
    """What keeps rows from being compared, each difference once."""
    first = rows[0].name
    found = [(row.name, row.caution) for row in rows if row.caution]
    within = [caution for name, caution in found if name == first]
    others = [(name, caution.removeprefix(f"{first} and {name}: ")) for name, caution in found if name != first]
    return within + [f"{first} and {sentence}" for sentence in _said_once(others, [row.name for row in rows[1:]])]


def notes(groups: Sequence[Group]) -> list[str]:
    """What the reader of the table should know about single runs, a sentence for what several have in common."""
    found = [(group.name, text) for group in groups for text in _notes(group, groups[0])]
    return _said_once(found, [group.name for group in groups[1:]])


def _said_once(remarks: Sequence[tuple[str, str]], all_names: Sequence[str]) -> list[str]:
    """Sentences of (name, text), a text once for all its names, which are "the others" if they are `all_names`."""
    names: dict[str, list[str]] = {}
    for name, text in remarks:
        names.setdefault(text, []).append(name)
    return [f"{_listed(list(dict.fromkeys(subjects)), all_names)}: {text}" for text, subjects in names.items()]


def _listed(names: Sequence[str], all_names: Sequence[str]) -> str:
    if len(names) > 2 and list(names) == list(all_names):
        return "the others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _notes(group: Group, first: Group) -> list[str]:
    found = []
    if not _evaluated_alike(first, group):
        found.append(f"evaluated at other token counts than {first.name}; differences are interpolated")
    # A seed says nothing of runs that began with given weights, whose configurations name them.
    starts = [(run.seed, run.group_key) for run in group.runs if run.seed is not None]
    if len(set(starts)) < len(starts):
        found.append("two runs have one seed; their spread is not the spread over seeds")
    sound = [run for run in group.runs if not run.diverged]
    if len(sound) < len(group.runs):
        places = ", ".join(run.diverged for run in group.runs if run.diverged)
        which = f"{len(group.runs) - len(sound)} of {len(group.runs)} runs" if len(group.runs) > 1 else "the run"
        found.append(f"{which} DIVERGED: the loss is no number from {places} on")
    done = sum(run.complete for run in sound)
    if 0 < done < len(sound):
        found.append(f"{len(sound) - done} of {len(group.runs)} runs left out as not complete")
    elif sound and not done:
        steps = ", ".join(f"{run.final.step} of {run.steps_total or 'an unknown number'}" for run in sound)
        found.append(f"not complete (evaluated at step {steps}); its loss is not a final one")
    return found + [note for run in group.runs for note in run.notes]


def _evaluated_alike(first: Group, group: Group) -> bool:
    """Whether the first run of `group` was evaluated where that of `first` was, as far as both go."""
    base, own = [[p.tokens for p in complete_runs(g)[0].points if p.tokens > 0] for g in (first, group)]
    if not base or not own:
        return True
    end = min(base[-1], own[-1]) * (1 + SAME_TOKENS)
    base, own = [[tokens for tokens in counts if tokens <= end] for counts in (base, own)]
    return len(base) == len(own) and all(abs(a - b) <= SAME_TOKENS * b for a, b in zip(own, base))


def _row(group: Group, target: float, first: Group | None, first_row: Row | None) -> Row:
    runs = complete_runs(group)
    diverged = any(run.diverged for run in runs)
    final_loss = None if diverged else Sample.of([run.final.val_loss for run in runs])
    reached = [] if diverged else [t for run in runs if (t := tokens_to_loss(run.points, target)) is not None]
    to_target = Sample.of(reached) if len(reached) == len(runs) else None
    saved = fraction = test = common = difference = None
    against = complete_runs(first or group)
    text = other_validation(against, runs)
    schedule, of_other_length = other_schedule(against, runs, target)
    if first is not None and text is None:
        if to_target and first_row.tokens_to_target and not of_other_length:
            saved = first_row.tokens_to_target.mean - to_target.mean
            fraction = saved / first_row.tokens_to_target.mean if first_row.tokens_to_target.mean else None
        if runs[0].complete and first_row.complete:
            test = welch_test(first_row.final_loss, final_loss)
        common, difference = _difference_at_common(against, runs)
    time = _mean(run.final and run.final.train_time_ms for run in runs)
    evaluated = _mean(run.final and run.final.tokens for run in runs)
    return Row(
        name=group.name,
        implementation=_agreed(run.implementation for run in runs) or "several",
        hardware=_agreed(run.hardware for run in runs),
        parameters=_agreed(run.parameters for run in runs),
        steps=_agreed(run.steps_total for run in runs),
        n=len(runs),
        complete=runs[0].complete,
        tokens_trained=_mean(run.tokens_trained for run in runs),
        tokens_read=_mean(run.tokens_read for run in runs),
        final_loss=final_loss,
        reached=len(reached),
        tokens_to_target=to_target,
        train_time_ms=time,
        tokens_per_s=1000 * evaluated / time if time and evaluated else None,
        p_below_target=p_mean_below(final_loss, target) if runs[0].complete else None,
        tokens_saved=saved,
        saved_fraction=fraction,
        final_loss_test=test,
        common_tokens=common,
        difference_at_common=difference,
        comparable=text is None and not of_other_length,
        caution=_caution(group.name, (first or group).name, text, schedule, of_other_length),
    )


def _caution(name: str, first: str, text: str | None, schedule: str | None, of_other_length: bool) -> str | None:
    differences = [f"validated {text}"] * (text is not None) + [schedule] * (schedule is not None)
    if not differences:
        return None
    verdict = "NO COMPARISON: " if text or of_other_length else ""
    return f"{name if name == first else f'{first} and {name}'}: {verdict}" + "; ".join(differences)


def _difference_at_common(first: Sequence[RunLog], runs: Sequence[RunLog]) -> tuple[float | None, float | None]:
    if any(run.diverged for run in (*first, *runs)):
        return None, None
    tokens = min(run.final.tokens for run in (*first, *runs))
    losses = [[loss_at(run.points, tokens) for run in side] for side in (first, runs)]
    if any(loss is None for side in losses for loss in side):
        return None, None
    return tokens, Sample.of(losses[1]).mean - Sample.of(losses[0]).mean


def _mean(values: Iterable[float | None]) -> float | None:
    """Their mean; None if any is missing."""
    values = list(values)
    return None if None in values else sum(values) / len(values)


def _agreed(values: Iterable) -> Any:
    """The value they all have, else None."""
    values = set(values)
    return values.pop() if len(values) == 1 else None


def _named_groups(entries: Sequence[tuple[str | None, tuple[RunLog, ...]]]) -> list[Group]:
    """The groups, all with different names: the user's, else the run's with what sets its configuration apart."""
    used = {name for name, _ in entries if name}
    groups = []
    for name, runs in entries:
        if name is None:
            peers = [others[0] for given, others in entries if given is None and others[0].name == runs[0].name]
            base = "".join(c if c.isprintable() else "?" for c in runs[0].name + _distinction(runs[0], peers))[:80]
            name = next(text for text in chain([base], (f"{base} #{k}" for k in count(2))) if text not in used)
            used.add(name)
        groups.append(Group(name, runs))
    return groups


def _distinction(run: RunLog, peers: Sequence[RunLog]) -> str:
    """The first two settings of the run that its peers do not all share, such as " (steps=1500)"."""
    settings, own = [_settings(peer.group_key) for peer in peers], _settings(run.group_key)
    differing = [key for key in own if any(other.get(key) != own[key] for other in settings)]
    shown = ", ".join(f"{key}={own[key]}" for key in differing[:2])
    return f" ({shown})" if shown else ""


def _settings(group_key: str) -> dict[str, object]:
    kind, _, text = group_key.partition(" ")
    return _flat(json.loads(text), "") if kind == "config" else {}


def _flat(value: object, prefix: str) -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}
