"""Factors of a study: their design, their effects against brute force, what a study makes of them, and its tables."""

import itertools
import math

import numpy as np
import pytest
from ablation import report, results
from ablation.factorial import MOST_FACTORS, design, effects
from ablation.study import read_study
from scipy.stats import t as student_t
from tiny_study import changed_study
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
optimizer.matrices.mixture = { start = 0.3, fast = 0.8, slow = 0.98, share = 0.4 }
"""


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
    on = {
        f"run{number}": tuple(name for name, is_on in zip(names, row) if is_on)
        for number, row in enumerate(design(factors))
    }
    losses = {
        f"run{number}": {seed: loss(np.array(row, float), seed) for seed in seeds}
        for number, row in enumerate(design(factors))
    }
    return names, on, losses, seeds


def test_effects_that_add_up_are_found_exactly():
    own = np.array([0.01, -0.02, 0.0, 0.003, -0.001])
    found = effects(*study_of(5, lambda levels, seed: 3.0 + levels @ own + seed, seeds=(0, 5)))
    assert [one.difference for one in found.of] == pytest.approx(own, abs=1e-12)
    assert [one.factor for one in found.of] == [f"f{n}" for n in range(5)]
    assert (found.finished, found.runs, found.df) == (32, 32, 32 - 5 - 2)
    assert found.sd == pytest.approx(0, abs=1e-12)
    assert max(one.half_width for one in found.of) < 1e-11


def test_what_two_factors_do_together_is_spread_and_no_effect_of_another():
    def loss(levels, seed):
        return 3.0 - 0.02 * levels[0] + 0.05 * (2 * levels[1] - 1) * (2 * levels[2] - 1)

    found = effects(*study_of(8, loss))
    assert [one.difference for one in found.of] == pytest.approx([-0.02] + 7 * [0], abs=1e-12)
    assert found.df == 16 - 8 - 1
    # Of the losses, each 0.05 off to one side or the other.
    assert found.sd == pytest.approx(0.05 * math.sqrt(16 / 7))
    width = student_t.ppf(0.975, 7) * found.sd * math.sqrt(4 / 16)
    assert [one.half_width for one in found.of] == pytest.approx(8 * [width])


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
    assert [one.difference for one in found.of] == pytest.approx(expected[1:])
    assert (found.finished, found.runs, found.df) == (16 - len(missing), 16, 16 - len(missing) - rank)
    assert found.sd == pytest.approx(math.sqrt(squares[0] / found.df))
    covariance = found.sd**2 * np.linalg.inv(levels.T @ levels)
    widths = student_t.ppf(0.975, found.df) * np.sqrt(np.diag(covariance))[1:]
    assert [one.half_width for one in found.of] == pytest.approx(widths)


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_too_few_runs_tell_nothing(finished):
    names, on, losses, seeds = study_of(3, lambda levels, seed: 3.0)
    found = effects(names, on, dict(list(losses.items())[:finished]), seeds)
    assert (found.of, found.finished, found.runs, found.sd) == ((), finished, 8, None)


def test_one_factor_has_an_effect_and_no_interval():
    found = effects(*study_of(1, lambda levels, seed: 3.0 - 0.1 * levels[0]))
    assert (found.of[0].difference, found.of[0].half_width, found.sd) == (pytest.approx(-0.1), None, None)


def test_a_study_has_a_run_for_each_combination(tmp_path):
    study = read_study(changed_study(tmp_path, ('[[variants]]\nname = "slow"', THREE + '[[variants]]\nname = "slow"')))
    names = ["base", "slow", *(f"factors-{number:02d}" for number in range(1, 8))]
    assert [variant.name for variant in study.variants] == names
    assert [job.name for job in study.jobs if job.variant == "factors-07"] == ["factors-07-seed0", "factors-07-seed1"]
    assert (study.design["base"], "slow" in study.design, len(study.design)) == ((), False, 8)
    for name, on in study.design.items():
        optimizer = study.job(name, 0).config.optimizer
        assert (optimizer.schedule.fraction == 0.6) == ("long" in on)
        assert (optimizer.schedule.floor == 0.0) == ("low" in on)
        assert (optimizer.matrices.rate == 0.07) == (optimizer.matrices.mixture is not None) == ("fast" in on)
    assert study.variants[2].text == f"with {', '.join(study.design['factors-01'])}"
    assert [factor.text for factor in study.factors][:2] == [
        "optimizer.schedule.fraction = 0.6",
        "optimizer.schedule.floor = 0.0",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schedule.floor = 0.0", "schedule.flor = 0.0", r"factor 'low': Cooldown has no field .*flor; did you mean"),
        ("schedule.floor = 0.0", "schedule.fraction = 0.5", r"factor 'low': another factor sets optimizer.schedule.fr"),
        ("schedule.floor = 0.0", "matrices.mixture = 'None'", r"factor 'low' computes the same as 'base'"),
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
    path = changed_study(tmp_path, ('[[variants]]\nname = "slow"', THREE + '[[variants]]\nname = "slow"'))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said) as caught:
        read_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_factors_and_none(tmp_path):
    many = "".join(
        f'[[factors]]\nname = "f{n}"\noptimizer.matrices.rate = 0.0{n + 1}\n' for n in range(MOST_FACTORS + 1)
    )
    with pytest.raises(UserError, match=f"there are {MOST_FACTORS + 1} factors; leave all but {MOST_FACTORS} out"):
        read_study(changed_study(tmp_path, ('[[variants]]\nname = "slow"', many + '[[variants]]\nname = "slow"')))
    with pytest.raises(UserError, match=r"factors is \[\]; give one table \[\[factors\]\] a factor$"):
        read_study(changed_study(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1]\nfactors = []")))


def test_the_tables_tell_the_effects(tmp_path):
    """`long` costs 0.1, `fast` gains 0.2; one run is 0.008 off."""
    path = changed_study(
        tmp_path, ('[[variants]]\nname = "slow"', THREE + '[[variants]]\nname = "slow"'), ("[0, 1]", "[0]")
    )
    study, root = read_study(path), tmp_path / "tiny"
    root.mkdir()
    before = results.read_results(study, root)
    assert report.effects_table(before) is None
    assert report.remarks(study, before)[0].endswith(
        "0 of 8 runs of their design are finished; these do not tell the factors apart."
    )
    for name, on in study.design.items():
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
    assert f"a run is {sd:.4f} off what the effects add up to (standard deviation, df = 4)" in block
