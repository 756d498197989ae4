"""The figures of a study, from its run folders alone: config.json and metrics.jsonl."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ablation.cost import flops_per_token
from ablation.factorial import Effects, effects
from ablation.noise import Noise
from ablation.runs import failure, finished_run, median_speed
from ablation.study import Study
from senano_jax.config_file import read_config
from senano_jax.runlog.curves import RunLog, ValidationPoint, tokens_to_loss
from senano_jax.runlog.data_record import PARTS, read_data
from senano_jax.runlog.statistics import Sample

Verdict = Literal["gain", "loss", "within noise", "one pair"]
Point = tuple[int, float]  # tokens of a complete schedule, and its final loss


class Finished(NamedTuple):
    folder: Path
    run: RunLog


Runs = Mapping[tuple[str, int, int], Finished]  # by variant, tokens and seed


@dataclass(frozen=True)
class Saved:
    """The tokens that the base needs for a variant's loss, less those that the variant was trained on."""

    tokens: float
    bound: Literal["", ">", "<"]
    """">" where the base needs more than its largest budget, "<" where it needs less than its smallest."""
    seeds: int
    """Seeds over which both losses are means."""


@dataclass(frozen=True)
class Figures:
    """One variant."""

    variant: str
    parameters: int | None
    flops_per_token: float | None
    flops_ratio: float | None
    """To the base's."""
    tokens_per_s: float | None
    """Median over its seeds."""
    losses: dict[int, float]
    """Final validation loss by seed, of those that are finished."""
    failures: dict[int, str]
    difference: Sample | None
    """Loss less the base's, over the seeds that both have; None for the base itself."""
    half_width: float | None
    """Half of the 95% interval of the mean difference; None for one pair."""
    lower: int
    """Pairs in which the loss is below the base's."""
    saved: Saved | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Results:
    figures: tuple[Figures, ...]
    """In the order of the study, the base first."""
    base_curve: dict[int, tuple[Point, ...]]
    """The base's complete schedules by seed, of the seeds that all budgets have."""
    effects: Effects | None
    """Of the study's factors, if it has some."""
    noise: Noise | None
    """Spread of one paired difference over seeds, pooled over the variants that have two pairs or more."""
    hardware: tuple[str, ...]
    remarks: tuple[str, ...]


def read_runs(study: Study, root: Path) -> Runs:
    """The finished runs of a study. Raises UserError for one of another configuration."""
    return {
        (job.variant, job.tokens, job.seed): Finished(root / job.name, run)
        for job in study.jobs
        if (run := finished_run(root, job))
    }


def read_results(study: Study, root: Path) -> Results:
    """The figures of what is finished. Raises UserError for a damaged folder or one of another configuration."""
    runs = read_runs(study, root)
    base, *others = [variant.name for variant in study.variants]
    losses = {name: losses_of(study, runs, name, study.tokens) for name in (base, *others)}
    differences = {
        name: Sample.of([losses[name][seed] - losses[base][seed] for seed in pairs])
        for name in others
        if (pairs := [seed for seed in losses[name] if seed in losses[base]])
    }
    noise = pooled_noise(differences.values())
    curve = base_curve(study, runs)
    base_flops = _flops(study, runs, base)
    figures = []
    for name in (base, *others):
        own = [finished for (variant, tokens, _), finished in runs.items() if (variant, tokens) == (name, study.tokens)]
        flops, difference = _flops(study, runs, name), differences.get(name)
        speeds = [speed for finished in own if (speed := median_speed(finished.folder)) is not None]
        figures.append(
            Figures(
                variant=name,
                parameters=own[0].run.parameters if own else None,
                flops_per_token=flops,
                flops_ratio=flops / base_flops if flops and base_flops else None,
                tokens_per_s=statistics.median(speeds) if speeds else None,
                losses=losses[name],
                failures={s: why for s in study.seeds if (why := failure(root, study.job(name, s))) is not None},
                difference=difference,
                half_width=difference.half_width() if difference else None,
                lower=sum(losses[name][seed] < losses[base].get(seed, -math.inf) for seed in losses[name]),
                saved=None if name == base else tokens_saved(curve, losses[name], study.tokens),
                verdict=judge(difference, noise) if difference else None,
            )
        )
    hardware = dict.fromkeys(finished.run.hardware for finished in runs.values() if finished.run.hardware)
    names = [factor.name for factor in study.factors]
    of_factors = effects(names, study.design, losses, study.seeds) if names else None
    return Results(tuple(figures), curve, of_factors, noise, tuple(hardware), tuple(_remarks(runs)))


def losses_of(study: Study, runs: Runs, variant: str, tokens: int) -> dict[int, float]:
    """Final losses of the finished runs by seed."""
    keys = [(variant, tokens, seed) for seed in study.seeds]
    return {key[2]: runs[key].run.final.val_loss for key in keys if key in runs}


def pooled_noise(differences: Iterable[Sample]) -> Noise | None:
    """Over the variants that have two pairs or more; None if there is none."""
    spreads = [(sample.n - 1, sample.sd) for sample in differences if sample.sd is not None]
    df = sum(weight for weight, _ in spreads)
    return Noise(math.sqrt(math.fsum(w * sd**2 for w, sd in spreads) / df), df) if df else None


def judge(difference: Sample, noise: Noise | None) -> Verdict:
    """A gain or a loss only if zero lies outside the interval of the variant's own spread and that of the pooled one:
    two seeds that happen to agree have a small spread of their own."""
    own = difference.half_width()
    if own is None or noise is None:
        return "one pair"
    if abs(difference.mean) <= max(own, noise.half_width(difference.n)):
        return "within noise"
    return "gain" if difference.mean < 0 else "loss"


def base_curve(study: Study, runs: Runs) -> dict[int, tuple[Point, ...]]:
    """(tokens, final loss) of the base's complete schedules by seed, of the seeds that all budgets have."""
    base = study.variants[0].name
    by_budget = {budget: losses_of(study, runs, base, budget) for budget in study.budgets}
    whole = [seed for seed in study.seeds if all(seed in losses for losses in by_budget.values())]
    return {seed: tuple((budget, by_budget[budget][seed]) for budget in by_budget) for seed in whole if by_budget}


def tokens_saved(curve: Mapping[int, Sequence[Point]], losses: Mapping[int, float], trained: int) -> Saved | None:
    """By the base's mean loss, linear in the logarithm of the tokens between its budgets, over the seeds that the
    variant has too. None if there is no such seed, or fewer than two budgets."""
    seeds = [seed for seed in curve if seed in losses]
    if not seeds or len(curve[seeds[0]]) < 2:
        return None
    loss = math.fsum(losses[seed] for seed in seeds) / len(seeds)
    points = [
        ValidationPoint(None, budget[0][0], math.fsum(value for _, value in budget) / len(seeds), None)
        for budget in zip(*(curve[seed] for seed in seeds))
    ]
    if loss > points[0].val_loss:
        return Saved(points[0].tokens - trained, "<", len(seeds))
    needed = tokens_to_loss(points, loss)
    if needed is None:
        return Saved(points[-1].tokens - trained, ">", len(seeds))
    return Saved(needed - trained, "", len(seeds))


def _flops(study: Study, runs: Runs, variant: str) -> float | None:
    """A token's, of the configuration that a finished run had."""
    keys = [(variant, study.tokens, seed) for seed in study.seeds]
    folder = next((runs[key].folder for key in keys if key in runs), None)
    return None if folder is None else flops_per_token(read_config(folder / "config.json")[0])


def _remarks(runs: Runs) -> Iterable[str]:
    """What makes runs less comparable than they look."""
    shards: dict[str, str] = {}
    for folder, run in runs.values():
        yield from (f"{folder.name}: {note}" for note in run.notes)
        data = read_data(folder)
        for part in PARTS if data else ():
            for number, shard in enumerate(data[part], start=1):
                first = shards.setdefault(f"{part} shard {number}", shard.sha256 or "")
                if shard.sha256 and first and shard.sha256 != first:
                    yield f"{folder.name}: its {part} shard {number} is not that of the first run"
    hardware = {run.hardware for _, run in runs.values()}
    if len(hardware) > 1:
        yield f"runs are from several kinds of hardware: {', '.join(sorted(map(str, hardware)))}; speeds do not compare"
