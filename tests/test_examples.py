"""The examples and the code of docs/change_it.md, run as they are, with a demo of two steps in place of the demo."""

import ast
import re
import runpy
from pathlib import Path

import pytest
from tiny_demo import tiny_demo

from senano_jax.presets import PRESETS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Runs a file in a folder of its own and returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "demo", tiny_demo)
    return lambda name: runpy.run_path(str(EXAMPLES / name))


def test_a_model_by_hand(run_example):
    names = run_example("model_by_hand.py")
    assert names["losses"][-1] < names["losses"][0] - 0.3
    assert names["slope"] == pytest.approx(names["norm"], rel=0.02)
    assert names["gradients"]["layer_0"]["attention"]["head_gate"]["gate"].any(), "the gate has a gradient too"


def test_a_swapped_optimiser_over_three_seeds(run_example):
    names = run_example("swap_optimizer.py")
    assert [(row.name, row.n, row.complete) for row in names["result"].rows] == [
        ("Muon", 3, True),
        ("AdamW", 3, True),
        ("sign descent", 3, True),
    ]
    used = [names["runs"][name][0].config.optimizer for name in names["runs"]]
    assert [getattr(optimizer, "name", None) for optimizer in used] == [None, "adamw", "sign_descent"]


def test_an_ablation_over_three_seeds(run_example):
    names = run_example("ablation.py")
    gate = names["differences"]["head gate"]
    means = [row.final_loss.mean for row in names["result"].rows]
    assert gate.n == 3
    assert gate.mean == pytest.approx(means[1] - means[0], abs=1e-6)


def test_every_example_has_a_test_and_cells():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert f'"{path.name}"' in Path(__file__).read_text()
        assert text.count("\n# %% ") >= 3
        assert ast.get_docstring(ast.parse(text))


def test_the_code_of_the_page_on_changes_runs(tmp_path, monkeypatch):
    """All Python blocks, one after another, in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "demo", tiny_demo)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "change_it.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number} of change_it.md", "exec"), names)
    assert len([line for line in blocks[1].splitlines() if line.strip()]) <= 15, "a swapped optimiser in 15 lines"
    assert [row.n for row in names["table"].rows] == [3, 3]
