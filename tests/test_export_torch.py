"""The script that exports a run: which checkpoint it takes, and what it refuses."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from tiny import small_run

from senano_jax.errors import UserError

torch = pytest.importorskip("torch")
export = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "export_torch.py"))["export"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "run", steps=(2, 4))


@pytest.mark.parametrize(("asked", "step"), [(None, 4), (2, 2)])
def test_the_newest_checkpoint_is_exported_or_that_of_a_step(asked, step, run_dir, tmp_path, capsys):
    out = tmp_path / "weights.pt"
    export(run_dir, out, asked)
    content = torch.load(out, weights_only=True)
    assert content["step"] == step
    np.testing.assert_array_equal(content["model"]["skip_weights"].numpy(), np.full(2, step))
    parameters = sum(tensor.numel() for tensor in content["model"].values())
    assert capsys.readouterr().out == f"{out}: {parameters:,} parameters in 27 tensors, after step {step}\n"


def test_an_existing_file_is_left_as_it_is(run_dir, tmp_path):
    out = tmp_path / "weights.pt"
    out.write_text("precious")
    with pytest.raises(UserError, match=r"weights\.pt exists already; choose another name, or delete it"):
        export(run_dir, out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("out", "step", "message"),
    [
        ("weights.bin", None, r"weights\.bin: .* let it end in \.pt"),
        ("nowhere/weights.pt", None, r"nowhere/weights\.pt: cannot be written \(No such file or directory\)"),
        ("weights.pt", 3, "--step 3: .* holds no checkpoint of this step; it holds: 2, 4"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(out, step, message, run_dir, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export(run_dir, tmp_path / out, step)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read .*; give the folder of a run"):
        export(tmp_path, tmp_path / "weights.pt")
