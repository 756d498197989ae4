"""The table of a study: for a terminal, as a block of a Markdown document, as JSON."""

import dataclasses
import json
from pathlib import Path

from ablation.factorial import Effect, Effects
from ablation.results import Figures, Results, Saved, read_runs
from ablation.study import Study
from senano_jax.errors import UserError
from senano_jax.runlog.comparison import Group
from senano_jax.runlog.tables import Table, to_markdown
from senano_jax.runlog.units import format_tokens

COMMAND = "python scripts/ablate.py"


def table(study: Study, results: Results) -> Table:
    """A row a variant of which a run has ended, the base first."""
    headers = (
        "variant", "parameters", "FLOPs/token", "tokens/s", *(f"loss, seed {seed}" for seed in study.seeds),
        "loss - base ± 95%", "seeds below the base", "tokens saved", "verdict",
    )  # fmt: skip
    rows = [
        (
            f"`{one.variant}`",
            "-" if one.parameters is None else f"{one.parameters:,}",
            "-" if one.flops_ratio is None else f"x {one.flops_ratio:.3f}",
            "-" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
            *(_loss(one, seed) for seed in study.seeds),
            *(("base",) * 3 if one is results.figures[0] else _against_base(one, study.tokens)),
            one.verdict or "",
        )
        for one in results.figures
        if one.losses or one.failures
    ]
    return Table(study.name, headers, tuple(rows))


def effects_table(results: Results) -> Table | None:
    """A row a factor; None without factors, or before the runs tell them apart."""
    if results.effects is None or not results.effects.by_factor:
        return None
    rows = [(f"`{one.factor}`", *_judged(one, results.effects)) for one in results.effects.by_factor]
    return Table("factors", ("factor", "loss with it - without it ± 95%", "verdict"), tuple(rows))


def remarks(study: Study, results: Results) -> list[str]:
    """What the reader of the tables must know, a sentence each."""
    found = list(results.remarks)
    if results.effects is not None:
        found.append(_of_effects(results.effects))
    if waiting := [f"`{one.variant}`" for one in results.figures if not (one.losses or one.failures)]:
        found.append(f"Not run yet: {', '.join(waiting)}.")
    if results.noise:
        sd, pairs = results.noise.sd, len(study.seeds)
        found.append(
            f"Noise: the difference of one pair of seeds has a standard deviation of {sd:.4f} (pooled, df = "
            f"{results.noise.df}); a mean over {pairs} within ±{results.noise.half_width(pairs):.4f} is no difference."
        )
    if any(one.verdict == "one pair" for one in results.figures):
        found.append("One pair of seeds has no interval, and is no proof of a gain.")
    if curve := results.base_curve:
        budgets = [budget for budget, _ in next(iter(curve.values()))]
        means = [sum(points[k][1] for points in curve.values()) / len(curve) for k in range(len(budgets))]
        base = ", ".join(f"{loss:.4f} after {format_tokens(budget)}" for budget, loss in zip(budgets, means))
        found.append(f"Complete schedules of the base ({len(curve)} seeds): {base}.")
    return found


def markdown_block(study: Study, results: Results) -> str:
    """What stands between the markers of the study."""
    base = study.variants[0].name
    introduction = (
        f"Study `{study.name}`: {format_tokens(study.tokens)} tokens a run, complete schedules, preset "
        f"`{study.preset}`, base `{base}`{' on ' + ' and '.join(results.hardware) if results.hardware else ''}."
    )
    common = f"All: {study.common}\n\n" if study.common else ""
    differences = [f"* `{variant.name}`: {variant.text or 'the preset'}" for variant in study.variants]
    if study.factors:
        differences += ["", "Factors:", "", *(f"* `{factor.name}`: {factor.text}" for factor in study.factors)]
    of_factors = effects_table(results)
    notes = [f"{remark}\n" for remark in remarks(study, results)]
    return "\n".join(
        [
            introduction,
            "",
            to_markdown(table(study, results)),
            "",
            *([to_markdown(of_factors), ""] if of_factors else []),
            f"{common}Differences:",
            "",
            *differences,
            "",
            *notes,
        ]
    )


def fill(document: str, study: Study, results: Results) -> str:
    """`document` with the study's block renewed, or appended. Raises UserError for markers that do not pair."""
    begin, end = (f"<!-- ablation {study.name} {edge} -->" for edge in ("begin", "end"))
    block = f"{begin}\n{markdown_block(study, results).rstrip()}\n{end}"
    if begin not in document and end not in document:
        gap = "" if not document else "\n" if document.endswith("\n") else "\n\n"
        return f"{document}{gap}{block}\n"
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    if document.count(begin) != 1 or document.count(end) != 1 or end not in rest:
        raise UserError(f"the markers {begin} and {end} must be there once each, in this order; mend the document")
    return before + block + after


def to_json(study: Study, results: Results) -> str:
    """All figures, exact; no NaN."""
    document = {"study": study.name, "preset": study.preset, "tokens": study.tokens, **dataclasses.asdict(results)}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def groups(study: Study, root: Path) -> list[Group]:
    """The finished runs at the study's budget, a group a variant. Raises UserError if the base has none."""
    runs, found = read_runs(study, root), []
    for variant in study.variants:
        own = [
            finished.run
            for (name, tokens, _), finished in runs.items()
            if (name, tokens) == (variant.name, study.tokens)
        ]
        if own:
            found.append(Group(variant.name, tuple(own)))
    if not found or found[0].name != study.variants[0].name:
        raise UserError(f"{root}: no run of the base {study.variants[0].name} is finished; see {COMMAND} status")
    return found


def _judged(one: Effect, effects: Effects) -> tuple[str, str]:
    if one.difference is None:
        return "-", "the same in all finished runs"
    difference = f"{one.difference:+.4f}" + ("" if one.half_width is None else f" ± {one.half_width:.4f}")
    if effects.finished < effects.runs:  # afterwards there is an interval: the design has more runs than effects
        return difference, "so far"
    if abs(one.difference) <= one.half_width:
        return difference, "within noise"
    return difference, "gain" if one.is_gain else "loss"


def _of_effects(effects: Effects) -> str:
    said = f"Design: {effects.finished} of {effects.runs} runs are finished"
    if not effects.by_factor:
        return f"{said}; these do not tell the factors apart."
    if effects.finished < effects.runs:
        return f"{said}; until all are, what two factors do together may look like the effect of a third."
    sd, df = effects.noise.sd, effects.noise.df
    said += f"; a run is {sd:.4f} off what the effects add up to (standard deviation, df = {df})"
    if effects.with_gains is not None:
        said += f"; with all gains they add up to {effects.with_gains:.4f}"
    return f"{said}. Intervals are for these seeds; of 20 factors without effect one is expected outside of its own."


def _loss(one: Figures, seed: int) -> str:
    if seed in one.losses:
        return f"{one.losses[seed]:.4f}"
    return "failed" if seed in one.failures else "-"


def _against_base(one: Figures, trained: int) -> tuple[str, str, str]:
    if one.difference is None:
        return "-", "-", "-"
    difference = f"{one.difference.mean:+.4f}" + ("" if one.half_width is None else f" ± {one.half_width:.4f}")
    return difference, f"{one.lower} of {one.difference.n}", _saved(one.saved, trained)


def _saved(saved: Saved | None, trained: int) -> str:
    if saved is None:
        return "-"
    sign, fraction = "+" if saved.tokens > 0 else "", saved.tokens / (saved.tokens + trained)
    bound = f"{saved.bound} " if saved.bound else ""
    seeds = f"{saved.seeds} seed{'s' if saved.seeds > 1 else ''}"
    return f"{bound}{sign}{format_tokens(saved.tokens, like=trained)} ({fraction:+.1%}, {seeds})"
