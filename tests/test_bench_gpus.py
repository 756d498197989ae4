"""Step times on several devices: what counts as communication, and the table of a tiny preset."""

import json

import bench_gpus
import pytest
from bench_gpus import communication_ms

from senano_jax.config import LayerSchedule, changed
from senano_jax.errors import UserError
from senano_jax.presets import demo
from senano_jax.profiling.kernels import Event


def test_communication_is_exposed_where_nothing_else_runs():
    """Two steps: collectives of 3 + 4 ms, of which a product covers 1 ms, and another collective 1 ms."""
    kernels = [
        ("gemm", 0, 5),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 4, 3),
        ("ncclDevKernel_ReduceScatter_Sum_f32", 6, 4),
        ("fusion_3", 12, 1),
    ]
    events = [Event(name, None, start * 1e6, length * 1e6) for name, start, length in kernels]
    total, exposed = communication_ms(events, steps=2)
    assert total == pytest.approx((3 + 4) / 2)
    assert exposed == pytest.approx((10 - 5) / 2)
    assert communication_ms([]) == (None, None)


def test_every_case_that_works_is_a_row(tmp_path, capsys, monkeypatch):
    small = changed(
        demo(),
        {"model.dim": 16, "model.num_heads": 2, "model.layers": LayerSchedule(1, 0, 0, 1)}
        | {"final_window_tokens": 256},
    )
    monkeypatch.setattr(bench_gpus, "preset", lambda name: small)
    monkeypatch.setattr(bench_gpus, "traced", lambda runner, window: [])  # a CPU's trace takes half a minute
    file = tmp_path / "gpus.json"
    flags = ["--gpus", "1", "2", "3", "--batch-tokens", "512", "--seq-len", "256", "--steps", "2", "--warmup", "0"]
    results = bench_gpus.main(["demo", *flags, "--windows", "1", "--json", str(file)])
    assert [(r.case.gpus, r.case.form) for r in results] == [(1, "replicated"), (2, "replicated"), (2, "shared")]
    assert all(r.tokens_per_s[1] == pytest.approx(512 * 1000 / r.step_ms[1]) for r in results)
    saved = json.loads(file.read_text())["results"]
    assert [r["step_ms"]["1"] for r in saved] == [r.step_ms[1] for r in results]
    rows = capsys.readouterr().out.splitlines()
    efficiency = results[1].tokens_per_s[1] / 2 / results[0].tokens_per_s[1]
    assert f"{efficiency:.1%}" in next(row for row in rows if row.split()[2:4] == ["2", "replicated"])
    assert sum("left out" in row and "3 devices" in row for row in rows) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "2", "2"], "--gpus 2 2: give different numbers"),
        (["--windows", "0"], "--windows 0"),
        (["--steps", "1"], "--steps 1"),
    ],
)
def test_values_that_make_no_sense_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        bench_gpus.main(["demo", *flags])
