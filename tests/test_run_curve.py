"""The curve of one run: what is drawn of its losses, and the files."""

import json
import math
import re
import sys

import pytest
from written_logs import run_folder

from senano_jax.errors import UserError
from senano_jax.runlog.plots import write_curve
from senano_jax.runlog.run_curve import run_curve


def trained(path, losses, evaluations=(), name="run"):
    """A run folder with these training losses, and {step: validation loss}."""
    folder = path / name
    run_folder(folder, 1.0, steps=len(losses))
    records = [{"step": k, "tokens_trained": k * 1000, "loss": loss} for k, loss in enumerate(losses, start=1)]
    for step, loss in dict(evaluations).items():
        records.append({"step": step, "tokens_trained": step * 1000, "val_loss": loss, "train_time_ms": step * 50.0})
    records.sort(key=lambda record: (record["step"], "val_loss" in record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def chart(page):
    return json.loads(re.search(r'id="data">(.*)</script>', page.read_text())[1])["charts"][0]


def falling(steps):
    return [3 + 8 / step + 0.1 * (-1) ** step for step in range(1, steps + 1)]


def test_a_run_of_two_evaluations_is_no_line_of_two_points(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    losses = falling(40)
    folder = trained(tmp_path, losses, {0: 10.8, 40: 3.21})
    assert write_curve(folder) == folder / "curve.html"
    assert not (folder / "curve.png").exists()
    training, validation = chart(folder / "curve.html")["series"]
    assert (len(training["points"]), len(training["seeds"][0])) == (40, 40)
    assert training["seeds"][0] == [[k / 1000, round(loss, 4)] for k, loss in enumerate(losses, start=1)]
    assert validation["points"] == [[0, 10.8], [0.04, 3.21]]


def test_the_table_has_the_values_of_the_curve(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_curve(trained(tmp_path, falling(200), {100: 3.23456, 200: 3.1}))
    smoothed = dict(map(tuple, chart(page)["series"][0]["points"]))
    rows = re.findall(
        r"<tr><td[^>]*>([^<]*)<.*?<td[^>]*>([^<]*)<.*?<td[^>]*>([^<]*)<.*?<td[^>]*>([^<]*)<", page.read_text()
    )
    assert rows == [
        ("0.10M", "100", "3.2346", f"{smoothed[0.1]:.4f}"), ("0.20M", "200", "3.1000", f"{smoothed[0.2]:.4f}"),
    ]  # fmt: skip


def test_smoothing_follows_the_curve_and_takes_the_noise_out(tmp_path):
    curve = run_curve(trained(tmp_path, falling(1000), {1000: 3.0}))
    assert curve.smoothed[0] == curve.training[0]  # the fall of the first steps is not rounded off
    for tokens, loss in curve.smoothed[400:]:
        assert loss == pytest.approx(3 + 8000 / tokens, abs=0.01)  # of a noise of 0.1


def test_the_first_steps_do_not_stretch_the_axis_of_a_long_run(tmp_path):
    curve = run_curve(trained(tmp_path, falling(1000), {0: 10.8, 1000: 3.0}))
    assert 3.3 < curve.highest < 4
    assert curve.lowest < 3
    short = run_curve(trained(tmp_path, falling(60), {0: 10.8, 60: 3.0}, "short"))
    assert short.highest > 10.8


def test_a_long_run_is_thinned(tmp_path):
    curve = run_curve(trained(tmp_path, falling(5000)))
    assert len(curve.training) == len(curve.smoothed) <= 2001
    assert curve.training[-1][0] == 5_000_000
    curve = run_curve(trained(tmp_path, falling(2001), name="every second, and so the last"))
    tokens = [tokens for tokens, _ in curve.training]
    assert tokens[-1] == 2_001_000 and len(set(tokens)) == len(tokens)


def test_a_run_without_evaluations_or_one_that_diverged_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name, losses, evaluations in [
        ("never", falling(5), {}), ("lost", [5.0, math.nan, math.nan], {1: 5.0, 3: math.nan}), ("one", [5.0], {}),
    ]:  # fmt: skip
        folder = trained(tmp_path, losses, evaluations, name)
        assert write_curve(folder) == folder / "curve.html"
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_of_a_run_without_losses(tmp_path):
    folder = trained(tmp_path, [math.nan])
    assert write_curve(folder) is None
    assert not (folder / "curve.html").exists()


def test_a_curve_that_cannot_be_written_is_a_user_error(tmp_path):
    folder = trained(tmp_path, falling(5))
    (folder / "curve.html").mkdir()
    with pytest.raises(UserError, match=r"curve\.html: cannot be written"):
        write_curve(folder)


def test_the_page_of_a_run_shows_any_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_curve(trained(tmp_path, falling(5), name="<b>&amp; DATA*")).read_text()
    assert "<h1>tiny, &lt;b&gt;&amp;amp; DATA*</h1>" in page
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(", page)
