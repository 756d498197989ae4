"""The examples and the code of docs/change_it.md, run as they are, with a demo of two steps in place of the demo."""

import ast
import dataclasses
import json
import re
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from tiny_demo import tiny_demo

import senano_jax
from senano_jax import api
from senano_jax.config_check import check_config
from senano_jax.optim.groups import parameter_group
from senano_jax.presets import PRESETS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "change_it.md"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Runs are short and in a folder of their own, and a system is trained once: runs with other seeds are copies of
    the first one, their losses moved by a hundredth a seed."""
    fit, trained = api.fit, {}

    def fit_once(config, optimizer=None, *, name=None, **options):
        system = (dataclasses.replace(config, seed=0), name or getattr(optimizer, "__name__", None))
        if system not in trained:
            trained[system] = fit(config, optimizer, name=name, **options)
        first = trained[system]
        if config.seed == first.config.seed:
            return first
        copy = Path(f"{first.folder}-seed{config.seed}")
        if not copy.exists():
            shutil.copytree(first.folder, copy)
            told = json.loads((copy / "config.json").read_text()) | {"seed": config.seed}
            (copy / "config.json").write_text(json.dumps(told))
            records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
            moved = [r | {"val_loss": r["val_loss"] + config.seed / 100} if "val_loss" in r else r for r in records]
            (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in moved))
        return senano_jax.Run(copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        patch.setitem(PRESETS, "demo", tiny_demo)
        patch.setattr(api, "fit", fit_once)
        yield


def run_example(name):
    return runpy.run_path(str(EXAMPLES / name))


def test_a_model_by_hand():
    names = run_example("model_by_hand.py")
    assert names["losses"][-1] < names["losses"][0] - 0.3
    assert names["slope"] == pytest.approx(names["norm"], rel=0.02)
    assert names["gradients"]["layer_0"]["attention"]["head_gate"]["gate"].any(), "the gate has a gradient too"


def test_a_swapped_optimiser_over_three_seeds():
    names = run_example("swap_optimizer.py")
    assert [(row.name, row.n, row.complete) for row in names["result"].rows] == [
        ("Muon", 3, True),
        ("AdamW", 3, True),
        ("sign descent", 3, True),
    ]
    used = [names["runs"][name][0].config.optimizer for name in names["runs"]]
    assert [getattr(optimizer, "name", None) for optimizer in used] == [None, "adamw", "sign_descent"]


def test_an_ablation_over_three_seeds():
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


def test_the_code_of_the_page_on_changes_runs():
    """All Python blocks, one after another, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number} of {PAGE.name}", "exec"), names)
    lines = [line for line in blocks[1].splitlines() if line.strip()]
    assert "fit(config, optax.adamw" in blocks[1] and len(lines) <= 15, "a swapped optimiser, three seeds, 15 lines"
    assert [row.n for row in names["table"].rows] == [3, 3]
    assert names["run"].final_loss < 10.9
    for name in ("config", "slower", "short", "weighted"):
        check_config(names[name])


def test_the_page_names_what_the_package_offers():
    assert [name for name in senano_jax.__all__ if f"`{name}" not in PAGE.read_text()] == []


def test_the_piece_of_the_page_is_one():
    """As attention applies it, and with a group of parameters."""
    block = next(block for block in PAGE.read_text().split("```python\n") if "class HeadScale" in block)
    names = {"nn": nn}
    exec(block.split("```")[0], names)
    piece = names["HeadScale"](visits=2, heads=3)
    y_BTHK = jnp.ones((1, 2, 3, 4), jnp.bfloat16)
    out, variables = piece.init_with_output(jax.random.key(0), y_BTHK, y_BTHK, None, 1, method=piece.after)
    assert (out.shape, out.dtype) == (y_BTHK.shape, y_BTHK.dtype)
    ((path, _),) = jax.tree.leaves_with_path(variables["params"])
    assert parameter_group(path) == "scalars"
