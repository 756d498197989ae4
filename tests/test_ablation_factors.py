"""Factors of a study: their design, their effects against brute force, what a study makes of them, and its tables."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from ablate import chosen
from ablation import report, results
from ablation.factorial import MOST_FACTORS, design, effects
from ablation.study import read_study
from scipy.stats import t as student_t
from tiny_study import SCRIPTS, changed_study
from written_runs import PARAMETERS, write_run

from senano_jax.config_file import write_config
from senano_jax.errors import UserError

THREE = """
[[factors]]
name = "long"
optimizer.schedule.fraction = 0.6

[[factors]]
name = "low"
optimizer.schedule.floor = 0.0

[[factors]]
name = "fast"
optimizer.matrices.rate = 0.07
optimizer.average = { start = 0.5, horizon = 0.2, share = 0.4, groups = ["head"] }
"""


def with_factors(tmp_path, factors, *replacements):
    """A file of the tiny study with these factors between its variants."""
    slow = '[[variants]]\nname = "slow"'
    return changed_study(tmp_path, (slow, factors + slow), *replacements)


def signs(factors):
    """+1 where a factor is on, -1 where it is off: [runs, factors]."""
    return np.where(np.array(design(factors)).reshape(-1, factors), 1, -1)


@pytest.mark.parametrize("factors", range(1, MOST_FACTORS + 1))
def test_the_design_is_of_resolution_four(factors):
    """Each factor is on in half of the runs; none goes along with another one, or with what two others do together."""
    levels = signs(factors)
    assert len(levels) == max(2, 2 ** math.ceil(math.log2(2 * factors)))
    assert (levels[0] == -1).all()
    assert (levels.sum(0) == 0).all()
    columns = range(factors)
    for a, b in itertools.combinations(columns, 2):
        assert levels[:, a] @ levels[:, b] == 0
        assert all((levels[:, a] * levels[:, b]) @ levels[:, c] == 0 for c in columns)


def study_of(factors, loss, seeds=(0,)):
    """What `effects` takes, of runs whose losses are loss(levels, seed)."""
    names = [f"f{n}" for n in range(factors)]
    rows = {f"run{number}": row for number, row in enumerate(design(factors))}
    on = {run: tuple(itertools.compress(names, row)) for run, row in rows.items()}
    losses = {run: {seed: loss(np.array(row, float), seed) for seed in seeds} for run, row in rows.items()}
    return names, on, losses, seeds


def test_effects_that_add_up_are_found_exactly():
    own = np.array([0.01, -0.02, 0.0, 0.003, -0.001])
    found = effects(*study_of(5, lambda levels, seed: 3.0 + levels @ own + seed, seeds=(0, 5)))
    assert [one.difference for one in found.by_factor] == pytest.approx(own, abs=1e-12)
    assert [one.factor for one in found.by_factor] == [f"f{n}" for n in range(5)]
    assert (found.finished, found.runs, found.noise.df) == (32, 32, 32 - 5 - 2)
    assert found.noise.sd == pytest.approx(0, abs=1e-12)
    assert max(one.half_width for one in found.by_factor) < 1e-11


def test_what_two_factors_do_together_is_spread_and_no_effect_of_another():
    def loss(levels, seed):
        return 3.0 - 0.02 * levels[0] + 0.05 * (2 * levels[1] - 1) * (2 * levels[2] - 1)

    found = effects(*study_of(8, loss))
    assert [one.difference for one in found.by_factor] == pytest.approx([-0.02] + 7 * [0], abs=1e-12)
    assert found.noise.df == 16 - 8 - 1
    # Of the losses, each 0.05 off to one side or the other.
    assert found.noise.sd == pytest.approx(0.05 * math.sqrt(16 / 7))
    width = student_t.ppf(0.975, 7) * found.noise.sd * math.sqrt(4 / 16)
    assert [one.half_width for one in found.by_factor] == pytest.approx(8 * [width])


@pytest.mark.parametrize("missing", [(), (3,), (0, 6, 9)])
def test_effects_are_those_of_least_squares_over_what_is_finished(missing):
    noise = np.random.default_rng(0).normal(size=16)
    names, on, losses, seeds = study_of(6, lambda levels, seed: 0.0)
    for number, value in enumerate(noise):
        losses[f"run{number}"] = {} if number in missing else {0: value}
    found = effects(names, on, losses, seeds)
    kept = [number for number in range(16) if number not in missing]
    levels = np.column_stack([np.ones(16), np.array(design(6), float)])[kept]
    expected, squares, rank, _ = np.linalg.lstsq(levels, noise[kept])
    assert [one.difference for one in found.by_factor] == pytest.approx(expected[1:])
    assert (found.finished, found.runs, found.noise.df) == (16 - len(missing), 16, 16 - len(missing) - rank)
    assert found.noise.sd == pytest.approx(math.sqrt(squares[0] / found.noise.df))
    covariance = found.noise.sd**2 * np.linalg.inv(levels.T @ levels)
    widths = student_t.ppf(0.975, found.noise.df) * np.sqrt(np.diag(covariance))[1:]
    assert [one.half_width for one in found.by_factor] == pytest.approx(widths)


@pytest.mark.parametrize("finished", [0, 1])
def test_too_few_runs_tell_nothing(finished):
    names, on, losses, seeds = study_of(3, lambda levels, seed: 3.0)
    found = effects(names, on, dict(list(losses.items())[:finished]), seeds)
    assert (found.by_factor, found.finished, found.runs, found.noise) == ((), finished, 8, None)


def test_a_factor_whose_runs_all_fail_hides_no_other_one():
    own = np.array([0.01, -0.02, 0.5, 0.003, -0.001])
    names, on, losses, seeds = study_of(5, lambda levels, seed: 3.0 + levels @ own + seed, seeds=(0, 5))
    losses = {variant: {} if "f2" in on[variant] else of_seed for variant, of_seed in losses.items()}
    found = effects(names, on, losses, seeds)
    assert (found.by_factor[2].difference, found.by_factor[2].half_width) == (None, None)
    others = [one.difference for one in found.by_factor if one.factor != "f2"]
    assert others == pytest.approx(np.delete(own, 2), abs=1e-12)
    assert (found.finished, found.runs, found.noise.df) == (16, 32, 16 - 4 - 2)


def test_two_factors_that_were_only_on_together_are_not_told_apart():
    """Though there are more runs than effects."""
    on = {f"run{n}": ("a", "b") if n % 2 else () for n in range(6)}
    found = effects(("a", "b"), on, {variant: {0: 3.0} for variant in on}, (0,))
    assert (found.by_factor, found.finished) == ((), 6)


def test_a_seed_that_has_not_begun_takes_no_mean():
    names, on, losses, _ = study_of(3, lambda levels, seed: 3.0 - 0.1 * levels[1] + 0.3 * seed)
    found = effects(names, on, losses, (0, 1))
    assert (found.finished, found.runs, found.noise.df) == (8, 16, 4)
    assert found.by_factor[1].difference == pytest.approx(-0.1)


def test_what_all_gains_add_up_to():
    """A wobble that no factor explains makes intervals; the gains are -0.2 and -0.1, and half of a seed's mean."""
    own = np.array([-0.2, 0.05, -0.1, 0.0])

    def loss(levels, seed):
        return 3.0 + levels @ own + seed + 0.001 * (2 * levels[0] - 1) * (2 * levels[1] - 1)

    found = effects(*study_of(4, loss, seeds=(0, 1)))
    assert [one.is_gain for one in found.by_factor] == [True, False, True, False]
    assert found.with_gains == pytest.approx(3.0 + 0.5 - 0.2 - 0.1, abs=1e-12)
    assert effects(*study_of(4, lambda levels, seed: 3.0 + 0.1 * levels[0])).with_gains is None


def test_a_study_has_a_run_for_each_combination(tmp_path):
    study = read_study(with_factors(tmp_path, THREE))
    names = ["base", "slow", *(f"factors-{number:02d}" for number in range(1, 8))]
    assert [variant.name for variant in study.variants] == names
    assert [job.name for job in study.jobs if job.variant == "factors-07"] == ["factors-07-seed0", "factors-07-seed1"]
    assert (study.design["base"], "slow" in study.design, len(study.design)) == ((), False, 8)
    for name, on in study.design.items():
        optimizer = study.job(name, 0).config.optimizer
        assert (optimizer.schedule.fraction == 0.6) == ("long" in on)
        assert (optimizer.schedule.floor == 0.0) == ("low" in on)
        assert (optimizer.matrices.rate == 0.07) == (optimizer.average is not None) == ("fast" in on)
    assert [job.variant for job in chosen(study, "factors-0[12],base-seed1")] == [
        "base", "factors-01", "factors-01", "factors-02", "factors-02",
    ]  # fmt: skip
    assert study.variants[2].text == f"with {', '.join(study.design['factors-01'])}"
    assert [factor.text for factor in study.factors][:2] == [
        "optimizer.schedule.fraction = 0.6",
        "optimizer.schedule.floor = 0.0",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schedule.floor = 0.0", "schedule.flor = 0.0", r"factor 'low': Cooldown has no field .*flor; did you mean"),
        ("schedule.floor = 0.0", "schedule.fraction = 0.5", r"factor 'low': optimizer.schedule.fraction is set twice"),
        ("schedule.floor = 0.0", "average = 'None'", r"factor 'low' computes the same as 'base'"),
        ("optimizer.schedule.floor = 0.0", "seed = 2", r"factor 'low': seed cannot be a difference"),
        ('name = "low"', 'name = "slow"', r"factor 'slow': a variant is called so, too"),
        ('name = "low"', 'name = "long"', r"two factors are called 'long'"),
        ('name = "low"', "", r"factor 2 has no name"),
        ('name = "low"', 'name = "low"\nfrom = "base"', r"factor 'low': from is for variants"),
        ('name = "slow"', 'name = "factors-03"', r"factors-03 is a run of the factors' design; give the variant"),
        ("optimizer.schedule.fraction = 0.6", "seq_len = 384", r"factor 'long': --"),
    ],
)  # fmt: skip
def test_bad_factors_are_refused_in_one_line(tmp_path, old, new, said):
    path = with_factors(tmp_path, THREE)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said) as caught:
        read_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, MOST_FACTORS + 1])
def test_too_many_factors_and_too_few(tmp_path, count):
    factors = "".join(f'[[factors]]\nname = "f{n}"\noptimizer.matrices.rate = 0.0{n + 1}\n' for n in range(count))
    with pytest.raises(UserError, match=f"there are {count} factors; give 3 to {MOST_FACTORS}, or make them variants"):
        read_study(with_factors(tmp_path, factors))


@pytest.mark.parametrize("factors", ["[]", "[3]"])
def test_factors_that_are_no_tables(tmp_path, factors):
    with pytest.raises(UserError, match=r"factors is \[3?\]; give one table \[\[factors\]\] a factor$"):
        read_study(changed_study(tmp_path, ("seeds = [0, 1]", f"seeds = [0, 1]\nfactors = {factors}")))


@pytest.mark.parametrize(
    ("one", "other", "twice"),
    [
        ('"optimizer.schedule.floor" = 0.0', "optimizer.schedule.floor = 0.05", "optimizer.schedule.floor"),
        ("optimizer.schedule.floor = 0.0", 'optimizer."schedule.floor" = 0.05', "optimizer.schedule.floor"),
        ('model.trunk = { kind = "Weighted", growth = 3.0 }', "model.trunk.growth = 2.0", "model.trunk"),
        ("model.trunk.growth = 2.0", 'model.trunk = { kind = "Weighted", growth = 3.0 }', "model.trunk"),
    ],
)
def test_no_two_factors_set_a_field_in_whatever_form(tmp_path, one, other, twice):
    factors = THREE.replace("optimizer.schedule.floor = 0.0", one).replace("optimizer.matrices.rate = 0.07", other)
    weighted = ("model = { dim = 16,", 'model = { dim = 16, trunk = { kind = "Weighted" },')
    said = rf"factor 'fast': {twice}(\.growth)? is set twice; give each factor fields of its own$"
    with pytest.raises(UserError, match=said):
        read_study(with_factors(tmp_path, factors, weighted))


def test_a_field_in_quotes_and_one_without_are_one_table(tmp_path):
    quoted = THREE.replace("optimizer.schedule.floor = 0.0", '"optimizer.schedule.floor" = 0.0')
    study, other = read_study(with_factors(tmp_path, THREE)), read_study(with_factors(tmp_path, quoted))
    assert [job.config for job in study.jobs] == [job.config for job in other.jobs]
    twice = quoted.replace('.floor" = 0.0', '.floor" = 0.0\noptimizer.schedule.floor = 0.05')
    with pytest.raises(UserError, match=r"factor 'low': optimizer\.schedule\.floor is set twice"):
        read_study(with_factors(tmp_path, twice))


def test_variants_are_not_derived_from_runs_of_the_design(tmp_path):
    path = with_factors(tmp_path, THREE)
    path.write_text(path.read_text() + '[[variants]]\nname = "more"\nfrom = "factors-01"\n')
    with pytest.raises(UserError, match="variant 'more': from is 'factors-01'; the variants are base, slow, more"):
        read_study(path)


def test_what_fails_in_combination_alone_is_named_by_its_factors(tmp_path):
    """Each of two shapes works, and both do not."""
    factors = THREE + '[[factors]]\nname = "heads"\nmodel.num_heads = 4\n'
    path = with_factors(tmp_path, factors.replace("schedule.floor = 0.0", "schedule.floor = 0.0\nmodel.dim = 24"))
    with pytest.raises(UserError, match=r"variant 'factors-\d\d' \(.*low.*heads.*\): "):
        read_study(path)


@pytest.mark.parametrize("path", sorted((SCRIPTS / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_read(path):
    study = read_study(path)
    assert study.name == path.stem.replace("_", "-")
    assert study.jobs


def test_the_tables_tell_the_effects(tmp_path):
    """`long` costs 0.1, `fast` gains 0.2; one run is 0.008 off."""
    path = with_factors(tmp_path, THREE, ("[0, 1]", "[0]"))
    study, root = read_study(path), tmp_path / "tiny"
    root.mkdir()
    before = results.read_results(study, root)
    assert report.effects_table(before) is None
    said = report.remarks(study, before)[0]
    assert said == "Design: 0 of 8 runs are finished; these do not tell the factors apart."
    for name, on in study.design.items():
        if name == "factors-07":
            *_, so_far = report.effects_table(results.read_results(study, root)).rows[0]
            assert so_far == "so far"
            assert "until all are, what two" in report.remarks(study, results.read_results(study, root))[0]
        loss = 4.0 + 0.1 * ("long" in on) - 0.2 * ("fast" in on) + 0.008 * (name == "factors-05")
        folder = write_run(root / f"{name}-seed0", steps=study.job(name, 0).config.steps, loss=loss)
        write_config(folder / "config.json", study.job(name, 0).config, "demo", PARAMETERS)
    found = results.read_results(study, root)
    names, shown, verdicts = zip(*report.effects_table(found).rows)
    assert names == ("`long`", "`low`", "`fast`")
    assert verdicts == ("loss", "within noise", "gain")
    # The run of 0.008 moves each mean by a quarter of it; what is left over are four residuals of a standard deviation
    # that Student's t at 4 degrees of freedom, 2.776, and the root of 4/8 make an interval of.
    sd = 0.008 * math.sqrt((1 - 4 / 8) / 4)
    moved = [0.002 if factor in study.design["factors-05"] else -0.002 for factor in ("long", "low", "fast")]
    for text, own, change in zip(shown, (0.1, 0.0, -0.2), moved):
        assert text == f"{own + change:+.4f} ± {2.776445 * sd * math.sqrt(4 / 8):.4f}"
    block = report.markdown_block(study, found)
    assert "| `long` |" in block
    assert "* `factors-05`: with " in block
    assert "Factors:\n\n* `long`: optimizer.schedule.fraction = 0.6\n" in block
    # With `fast` alone: that run moves the mean by an eighth of its 0.008, and each half effect by another eighth.
    assert f"Design: 8 of 8 runs are finished; a run is {sd:.4f} off what the effects add up to (standard" in block
    assert f"df = 4); with all gains they add up to {4.0 - 0.2 + 0.001 * (1 - 1 + 1 + 1):.4f}. Intervals" in block

    figures = tmp_path / "figures.json"
    command = [sys.executable, SCRIPTS / "ablate.py", "table", path, "--out", tmp_path]
    printed = subprocess.run([*command, "--json", figures], check=True, capture_output=True, text=True).stdout
    assert shown[2] in printed
    of_fast = json.loads(figures.read_text())["effects"]["by_factor"][2]
    assert of_fast["difference"] == found.effects.by_factor[2].difference
