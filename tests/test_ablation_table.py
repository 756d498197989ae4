"""The table of a study: every figure is worked out by hand here, from runs that were written, not trained."""

import json
import math

import pytest
from ablation import report, results, runner, runs
from ablation.study import read_study
from tiny_study import Command, output_of
from written_runs import BATCH, PARAMETERS, write_run

from senano_jax.config_file import write_config
from senano_jax.errors import UserError
from senano_jax.runlog.statistics import Sample

WRITTEN = f"""
name = "written"
preset = "demo"
tokens = {4 * BATCH}
seeds = [0, 1, 2]
budgets = [{2 * BATCH}, {8 * BATCH}]

[[variants]]
name = "base"

[[variants]]
name = "better"
optimizer.matrices.rate = 0.06

[[variants]]
name = "same"
optimizer.matrices.rate = 0.07

[[variants]]
name = "alone"
optimizer.matrices.rate = 0.08

[[variants]]
name = "best"
model.layers.visits = 4

[[variants]]
name = "begun"
optimizer.matrices.rate = 0.09
"""
LOSSES = {
    ("base", 2): (4.40, 4.42, 4.38),
    ("base", 4): (4.00, 4.02, 3.98),
    ("base", 8): (3.80, 3.82, 3.78),
    ("better", 4): (3.90, 3.93, 3.87),
    ("same", 4): (4.01, 4.01, 3.983),
    ("alone", 4): (3.5,),
    ("best", 4): (3.6, 3.62, 3.58),
}
SPEEDS = {1: {"tokens_per_s": 7}, 2: {"tokens_per_s": 90}, 3: {"tokens_per_s": 500}, 4: {"tokens_per_s": 600}}


@pytest.fixture
def ablate():
    with Command() as command:
        yield command


@pytest.fixture
def written(tmp_path):
    """A study and its folder: runs that were written, not trained."""
    path, root = tmp_path / "written.toml", tmp_path / "written"
    path.write_text(WRITTEN)
    root.mkdir()
    study = read_study(path)
    for (variant, steps), losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            job = study.job(variant, seed, steps * BATCH)
            folder = write_run(root / job.name, steps=steps, loss=loss, changes=SPEEDS)
            write_config(folder / "config.json", job.config, "demo", PARAMETERS)
    begun = write_run(root / "begun-seed0", steps=3)
    write_config(begun / "config.json", study.job("begun", 0).config, "demo", PARAMETERS)
    return study, root


def test_the_figures_are_those_worked_out_by_hand(written):
    found = results.read_results(*written)
    base, better, same, alone, best, begun = found.figures
    t_2 = 4.302652730  # Student's 97.5% point of 2 degrees of freedom
    assert base.losses == {0: 4.00, 1: 4.02, 2: 3.98}
    assert base.parameters == PARAMETERS
    assert base.tokens_per_s == 550  # of steps 3 and 4
    assert (base.difference, base.saved, base.verdict, base.lower) == (None, None, None, 0)

    assert better.difference.mean == pytest.approx(-0.10)
    assert better.difference.sd == pytest.approx(0.01)
    assert better.half_width == pytest.approx(t_2 * 0.01 / math.sqrt(3))
    assert (better.lower, better.difference.n, better.verdict) == (3, 3, "gain")
    # 3.90 lies half-way from 4.00 after 4 steps to 3.80 after 8, in the logarithm: at sqrt(4 x 8) steps.
    assert better.saved.tokens == pytest.approx((math.sqrt(32) - 4) * BATCH)
    assert (better.saved.bound, better.saved.seeds) == ("", 3)

    # Differences 0.010, -0.010 and 0.003; 4.001 lies 0.9975 of the way from 2 to 4 steps.
    assert same.difference.mean == pytest.approx(0.001)
    variance = (0.009**2 + 0.011**2 + 0.002**2) / 2
    assert same.half_width == pytest.approx(t_2 * math.sqrt(variance / 3))
    assert (same.lower, same.verdict) == (1, "within noise")
    assert same.saved.tokens == pytest.approx((2 * 2**0.9975 - 4) * BATCH)

    assert (alone.difference, alone.half_width, alone.lower) == (Sample(pytest.approx(-0.5), None, 1), None, 1)
    assert alone.verdict == "one pair"
    assert (alone.saved.tokens, alone.saved.bound, alone.saved.seeds) == (4 * BATCH, ">", 1)

    # Two applications of six layers' matrices become four: 6 applications in all become 10.
    ratio = (24 * 10 * 64**2 + 2 * 64 * 50_304) / (24 * 6 * 64**2 + 2 * 64 * 50_304)
    assert ratio < best.flops_ratio < ratio + 0.02  # attention's pairs are few beside a head of 50,304
    assert (best.verdict, best.saved.bound) == ("gain", ">")
    assert begun.losses == {}
    assert (begun.difference, begun.saved, begun.verdict) == (None, None, None)

    # Three variants with three pairs each; all differences of `best` are -0.4.
    assert found.noise.df == 6
    assert found.noise.sd == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * variance) / 6))
    assert found.remarks == ()
    assert found.hardware == ("8 x NVIDIA H100 80GB HBM3",)


def test_a_small_difference_is_no_gain_however_well_two_seeds_agree():
    agreeing, noise = Sample(-0.002, 0.00001, 2), results.Noise(0.003, 10)
    assert abs(agreeing.mean) > agreeing.half_width()
    assert results.judge(agreeing, noise) == "within noise"
    assert results.judge(Sample(-0.02, 0.00001, 2), noise) == "gain"
    assert results.judge(Sample(0.02, 0.00001, 2), noise) == "loss"
    assert results.judge(Sample(-0.02, 0.01, 2), noise) == "within noise"  # its own spread
    assert results.judge(Sample(-0.02, None, 1), noise) == "one pair"


def test_the_table_and_its_json(written):
    study, root = written
    before = results.read_results(study, root)
    assert "`begun`" not in [cells[0] for cells in report.table(study, before).rows]
    assert "Not run yet: `begun`." in report.remarks(study, before)
    runner.write_atomically(runs.failure_file(root, study.job("begun", 1)), b"error: it has loss nan\n")
    found = results.read_results(study, root)
    rows = {cells[0]: cells[1:] for cells in report.table(study, found).rows}
    assert rows["`base`"] == (f"{PARAMETERS:,}", "x 1.000", "550", "4.0000", "4.0200", "3.9800", *("base",) * 3, "")
    assert rows["`better`"][2:] == (
        "550", "3.9000", "3.9300", "3.8700", "-0.1000 ± 0.0248", "3 of 3", "+6,786 (+29.3%, 3 seeds)", "gain"
    )  # fmt: skip
    assert rows["`alone`"][3:] == ("3.5000", "-", "-", "-0.5000", "1 of 1", "> +16,384 (+50.0%, 1 seed)", "one pair")
    assert rows["`begun`"] == ("-", "-", "-", "-", "failed", "-", "-", "-", "-", "")
    block = report.markdown_block(study, found)
    assert "| `better` | 6,632,527 | x 1.000 | 550 |" in block
    assert "* `best`: model.layers.visits = 4\n" in block
    assert "One pair of seeds has no interval" in block
    assert "(3 seeds): 4.4000 after 8,192, 4.0000 after 16,384, 3.8000 after 32,768." in block
    document = json.loads(report.to_json(study, found))
    assert document["figures"][1]["losses"] == {"0": 3.9, "1": 3.93, "2": 3.87}
    assert document["figures"][5]["failures"] == {"1": "error: it has loss nan"}


def test_a_run_of_another_configuration_or_on_other_shards_is_noticed(written):
    study, root = written
    data = root / "same-seed1" / "data.json"
    document = json.loads(data.read_text())
    document["train"][1]["sha256"] = "0" * 64
    data.write_text(json.dumps(document))
    assert results.read_results(study, root).remarks == ("same-seed1: its train shard 2 is not that of the first run",)
    write_config(root / "better-seed2" / "config.json", study.job("same", 2).config, "demo", PARAMETERS)
    with pytest.raises(UserError, match=r"optimizer\.\S+ 0.07, the study says 0.06; give the variant another name"):
        results.read_results(study, root)


def test_the_writer_keeps_the_rest_of_the_document(written):
    study, root = written
    found = results.read_results(study, root)
    begin, end = "<!-- ablation written begin -->", "<!-- ablation written end -->"
    fresh = report.fill("# Title\n\nText.\n", study, found)
    assert fresh.startswith(f"# Title\n\nText.\n\n{begin}\nStudy `written`: 16,384 tokens a run")
    assert fresh.endswith(f"\n{end}\n")
    assert report.fill(fresh, study, found) == fresh
    around = f"before\n{begin}\nold\n{end}after <!-- ablation written2 begin -->"
    renewed = report.fill(around, study, found)
    assert renewed.startswith(f"before\n{begin}\n")
    assert renewed.endswith(f"\n{end}after <!-- ablation written2 begin -->")
    assert "old" not in renewed
    assert report.fill("", study, found).startswith(begin)
    for bad in (begin, end, f"{end} {begin}", f"{begin} {end} {begin} {end}"):
        with pytest.raises(UserError, match="must be there once each"):
            report.fill(bad, study, found)


def test_table_and_plot_write_what_they_are_asked_for(written, tmp_path, ablate):
    study, root = written
    document, figures, image = tmp_path / "page.md", tmp_path / "figures.json", tmp_path / "curves.svg"
    document.write_text("# Page\n")
    where = (study.path, "--out", root.parent)
    status, output = output_of(ablate("table", *where, "--write", document, "--json", figures))
    assert status == 0, output
    assert "within noise" in output
    assert document.read_text() == report.fill("# Page\n", study, results.read_results(study, root))
    assert json.loads(figures.read_text())["study"] == "written"
    status, output = output_of(ablate("plot", *where, "--image", image))
    assert status == 0, output
    assert "better" in image.read_text()
