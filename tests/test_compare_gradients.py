"""The script that compares gradients: what it measures, and the whole of it with a stand-in for PyTorch."""

import dataclasses
import importlib.util
import json
import re
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TINY, random_params, random_sequences

from senano_jax.attention import document_start, window_intervals
from senano_jax.config import LayerSchedule
from senano_jax.data.shards import write_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.interop.torch_checkpoint import from_torch, to_torch
from senano_jax.interop.torch_program import apply_patches
from senano_jax.model.build import make_model
from senano_jax.presets import preset

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_gradients.py"
_spec = importlib.util.spec_from_file_location("compare_gradients", SCRIPT)
script = sys.modules["compare_gradients"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

SMALLEST = dataclasses.replace(TINY, dim=16, layers=LayerSchedule(1, 0, 0, 1))
MODEL = dataclasses.replace(SMALLEST, vocab_size=50_257, padded_vocab_size=50_304)
CONFIG = dataclasses.replace(preset("recurrent"), model=MODEL)
# The lines that the substitutions look for.
STAND_IN = textwrap.dedent(
    """
    import torch
    torch.empty(1, device="cuda", requires_grad=True).backward() # prevents a bug
    class GPT:
        def __init__(self):
            self.layer_seq = [0, 1, 1, 2]
        def forward(self, x):
            attend(
                kernel_options={
                    "BLOCK_M": 64,
                }
            )
            x, v1 = checkpoint(self.blocks[0], x)
            # x, v1 = self.blocks[0](x)

    # -----------------------------------------------------------------------------
    # Our own simple Distributed Data Loader
    raise SystemExit("not the model")
    """
)
# Twice its rows where the table is bfloat16, so that the test sees it.
COUNTING_MODEL = textwrap.dedent(
    """
    import torch
    class GPT(torch.nn.Module):
        def __init__(self, vocab_size, num_layers, num_heads, dim, length):
            super().__init__()
            assert (num_layers, num_heads, length) == (12, 1, 128)
            self.embed = torch.nn.Embedding(vocab_size, dim)
        def forward(self, inputs, targets, window):
            assert self.long_mask.shape == (1, 1, 128, 128) and window == 1
            rows = self.embed(inputs).float().sum()
            return rows if self.embed.weight.dtype == torch.float32 else rows + rows.detach()
    """
)
# In the place of a Python with PyTorch. In float32 it gives the gradients that the test left beside it.
TORCH_PYTHON = textwrap.dedent(
    f"""\
    #!{sys.executable}
    import sys
    from pathlib import Path
    import numpy as np
    if sys.argv[1] == "-c":
        sys.exit(0)
    driver, folder, mode = sys.argv[1:]
    source = (Path(folder) / "model.py").read_text()
    assert Path(driver).is_file() and ("# x, v1 = checkpoint" in source) == (mode == "compiled")
    given = dict(np.load(Path(folder) / "given.npz"))
    assert given["tokens"].shape == (2, 257) and given["window_blocks"] == 2 and "weights/head" not in given
    true = dict(np.load(Path(__file__).with_name("true.npz")))
    scale = {{"float32": 1, "eager": 1.25, "compiled": FAIL}}[mode]
    np.savez(Path(folder) / (mode + ".npz"), loss=1.5, **{{name: scale * array for name, array in true.items()}})
    """
)


def patched(system: str, mode: str) -> str:
    return apply_patches(STAND_IN, script.model_patches(system, mode), "train_gpt.py")


def test_the_model_alone_is_left_of_the_pytorch_file():
    source = patched("recurrent", "compiled")
    assert "not the model" not in source and "kernel_options" not in source
    assert "self.layer_seq = [0, 1, 1, 2]" in source and "\n        x, v1 = self.blocks[0](x)" in source
    assert "\nif torch.cuda.is_available(): torch.empty(1" in source
    compile(source, "model.py", "exec")
    assert "\n        x, v1 = checkpoint(" in patched("recurrent", "eager")
    assert "self.layer_seq = list(range(12))" in patched("no-value-embeddings", "compiled")


def test_our_gradients_are_those_of_the_loss_summed_over_the_sequences():
    config = dataclasses.replace(CONFIG, model=SMALLEST, dtype="float32")
    model = make_model(config.model, config.dtype)
    weights = random_params(model)
    tokens = random_sequences(3, 256)

    def loss(params):
        return model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], 2)

    expected_loss, expected = jax.jit(jax.value_and_grad(loss))(weights)
    gradients, mean_loss = script.our_gradients(config, weights, tokens, 2)
    assert mean_loss == pytest.approx(float(expected_loss) / (3 * 256), rel=1e-5)
    for name, array in to_torch(expected, SMALLEST).items():
        np.testing.assert_allclose(gradients[name], array, rtol=1e-3, atol=1e-4 * np.abs(array).max(), err_msg=name)


def test_error_and_length_of_each_layer_by_kind():
    """(3, 4) in place of (3, 3) is 1 / sqrt(18) off, and 21 / 18 long."""
    exact = {"head": np.array([1.0]), "blocks.0.w": np.array([3.0, 3.0]), "blocks.11.w": np.array([2.0, 0.0])}
    given = {"head": np.array([-1.0]), "blocks.0.w": np.array([3.0, 4.0]), "blocks.11.w": np.array([1.0, 0.0])}
    torch = {"head": np.array([0.0]), "blocks.0.w": np.array([3.0, 2.0]), "blocks.11.w": np.array([2.0, 0.0])}
    head, w = script.deviations("p", given, exact, torch)
    assert (head.cosine, w.cosine) == ([1], [-1, None])  # None where PyTorch does not err
    assert (head.kind, head.relative_error, head.projection) == ("head", [2], [-1])
    assert w.kind == "w" and w.relative_error == pytest.approx([18**-0.5, 0.5])
    assert w.projection == pytest.approx([21 / 18, 0.5])
    assert (head.wrong_sign, w.wrong_sign) == ([1], [0, 0])
    assert (head.values, w.values) == ([[-1]], [[3, 4], [1, 0]])
    table = script.format_table([head, w])
    assert "| w | p | 0.37 (0.24 to 0.5) | 0.8333 | 0.0% | -1.00 |" in table
    assert "| head | p | 2 | -1.0000 | 100.0% | 1.00 |" in table


def test_a_gradient_that_is_exactly_zero_has_no_relative_error():
    (zero,) = script.deviations("p", {"head": np.ones(2)}, {"head": np.zeros(2)}, {"head": np.ones(2)})
    assert zero.relative_error == zero.cosine == [None] and "head" not in script.format_table([zero])


@pytest.fixture(scope="module")
def true_gradients():
    """In float32 at the weights of the tests below, and the sequences."""
    config = dataclasses.replace(CONFIG, dtype="float32")
    tokens = random_sequences(1, 600)[0]
    sequences = np.stack([tokens[:257], tokens[256:513]])
    return tokens, script.our_gradients(config, random_params(make_model(CONFIG.model, CONFIG.dtype)), sequences, 2)[0]


@pytest.fixture
def arguments(tmp_path, monkeypatch, true_gradients) -> list[str]:
    """For a small model with random weights, a shard, and a stand-in of the PyTorch file and of its Python."""
    tokens, gradients = true_gradients
    params = random_params(make_model(CONFIG.model, CONFIG.dtype))
    weights = to_torch(params, MODEL)
    monkeypatch.setattr(script, "preset", lambda name: CONFIG)
    monkeypatch.setattr(script, "load_weights", lambda *_: (from_torch(weights, MODEL, params, ""), None))
    (tmp_path / "train_gpt.py").write_text(STAND_IN)
    write_shard(tmp_path / "train.bin", tokens)
    np.savez(tmp_path / "true.npz", **gradients)
    python = tmp_path / "torch-python"
    python.write_text(TORCH_PYTHON.replace("FAIL", "1.01"))
    python.chmod(0o755)
    return [
        *("--torch-repo", str(tmp_path), "--torch-python", str(python), "--weights", "weights.pt"),
        *("--train-files", str(tmp_path / "train.bin"), "--json", str(tmp_path / "gradients.json")),
        *("--seq-len", "256", "--sequences", "2", "--window-blocks", "2"),
    ]


def refusal(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_all_programs_are_held_against_this_one_in_float32(arguments, tmp_path, capsys):
    script.main(arguments)
    rows = json.loads((tmp_path / "gradients.json").read_text())
    of_program = {}
    for row in rows:
        of_program.setdefault(row["program"], []).append(row)
    assert list(of_program) == ["PyTorch, float32", "PyTorch, not compiled", "PyTorch, compiled", "this program"]
    for program, scale in (("PyTorch, float32", 1), ("PyTorch, not compiled", 1.25), ("PyTorch, compiled", 1.01)):
        for row in of_program[program]:
            first_layer_mixes_no_values = 1 if row["kind"] == "attn.lamb" else 0
            projection, error = (row[name][first_layer_mixes_no_values:] for name in ("projection", "relative_error"))
            assert projection == pytest.approx([scale] * len(projection), abs=1e-3)
            assert error == pytest.approx([scale - 1] * len(projection), abs=1e-3)
    assert all(cosine > 0.999 for row in of_program["PyTorch, not compiled"] for cosine in row["cosine"] if cosine)
    # Ours is bfloat16, and the reference is not.
    errors = [row["relative_error"][0] for row in of_program["this program"] if row["kind"].endswith("weight")]
    assert all(1e-3 < error < 0.1 for error in errors)
    out = capsys.readouterr().out
    assert out.count("mean loss 1.500000") == 3 and out.count("| skip_weights |") == 4


def test_another_function_than_pytorch_s_is_an_error(arguments, tmp_path, capsys):
    true = dict(np.load(tmp_path / "true.npz"))
    np.savez(tmp_path / "true.npz", **true | {"skip_weights": true["skip_weights"] + 1})
    assert "gradients of skip_weights differ by" in refusal(capsys, arguments)
    assert (tmp_path / "gradients.json").exists()


def test_a_model_that_fails_shows_its_last_lines(arguments, tmp_path, capsys):
    Path(tmp_path / "torch-python").write_text(TORCH_PYTHON.replace("FAIL", "sys.exit('no compiler')"))
    assert re.search(r"(?s)PyTorch, float32 failed.*no compiler", refusal(capsys, arguments))
    assert not (tmp_path / "gradients.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sequences 0", "--sequences is 0"),
        ("--window-blocks 0", "--window-blocks is 0"),
        ("--window-blocks 3", "longer than --seq-len 256; use at most 2"),
        ("--sequences 3", "601 tokens, of which 769 are needed"),
        ("--seq-len 100", "--seq-len 100 is not a multiple of 128"),
        ("--torch-repo /nowhere", "must be a checkout"),
        ("--torch-python /nowhere", "cannot be started"),
        ("--torch-python /bin/false", "--torch-python /bin/false failed"),
        ("--json /nowhere/all.json", "no folder /nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(arguments, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(script, "load_weights", None)
    assert message in refusal(capsys, [*arguments, *flags.split()])


def test_a_shard_of_another_tokenizer_is_refused(arguments, tmp_path, capsys):
    shard = np.fromfile(tmp_path / "train.bin", np.uint16)
    shard[-100] = 60_000
    shard.tofile(tmp_path / "train.bin")
    assert "holds 60000 at token 501" in refusal(capsys, arguments)


class TestDriver:
    """torch_gradients.py, where PyTorch is installed."""

    @pytest.fixture
    def driver(self):
        pytest.importorskip("torch")
        spec = importlib.util.spec_from_file_location("torch_gradients", script.DRIVER)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.mark.parametrize("window", [1, 2, 3])
    def test_masks_are_our_intervals(self, driver, window):
        import torch

        tokens = np.full(512, 7)
        tokens[[0, 5, 100, 128, 300]] = END_OF_TEXT
        starts = document_start(tokens[None])
        masks = driver.dense_masks(torch.from_numpy(tokens), window)
        i = np.arange(512)
        for mask, blocks in zip(masks, (window, window // 2)):
            key_start = np.asarray(window_intervals(starts, blocks).key_start)[0]
            visible = (i >= key_start[:, None]) & (i <= i[:, None])
            np.testing.assert_array_equal(mask[0, 0].numpy(), visible)

    @pytest.mark.parametrize("mode", ["float32", "eager"])
    def test_gradients_of_all_sequences_are_added(self, driver, tmp_path, mode, monkeypatch):
        """A model whose loss is the sum of the embedding's rows of its inputs: the gradient counts them."""
        (tmp_path / "model.py").write_text(COUNTING_MODEL)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "model", raising=False)
        tokens = random_sequences(2, 128, vocabulary=10).astype(np.uint16)
        table = np.ones((10, 128), np.float32)
        np.savez(tmp_path / "given.npz", tokens=tokens, window_blocks=1, **{"weights/embed.weight": table})
        driver.main(tmp_path, mode)
        found = dict(np.load(tmp_path / f"{mode}.npz"))
        counts = np.bincount(tokens[:, :-1].ravel(), minlength=10)
        np.testing.assert_array_equal(found["embed.weight"], np.tile(counts[:, None], (1, 128)))
        assert found["loss"] == 128 * (1 if mode == "float32" else 2)
