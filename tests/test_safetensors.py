"""Weights as a safetensors file: out of a run and in again, bit by bit, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import random_params, small_run, tiny_gpt2, tiny_model

from senano_jax import evaluate, export, train
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.interop.safetensors_file import config_in_safetensors, read_safetensors, write_safetensors
from senano_jax.model.build import abstract_params, make_model
from senano_jax.training.mesh import make_mesh
from senano_jax.training.weights import load_weights

SHORT = ["--data.val-tokens=1024", "--data.val-seq-len=1024", "--devices=1"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "run", steps=(2, 4))


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    return export.main([str(run_dir), str(tmp_path_factory.mktemp("out") / "weights.safetensors")])


def held(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("model", [tiny_model(jnp.bfloat16), tiny_gpt2()], ids=["gpt", "gpt2"])
def test_every_tensor_comes_back_with_its_bits_and_type(model, tmp_path):
    params, path = random_params(model), tmp_path / "w.safetensors"
    write_safetensors(path, params, 7, "{}")
    arrays, metadata = held(path)
    assert metadata.keys() == {"config", "step", "senano_jax"} and metadata["step"] == "7"
    restored, step = read_safetensors(path, abstract_params(model))
    assert step == 7 and jax.tree.structure(restored) == jax.tree.structure(params)
    for name, leaf in leaves(params).items():
        for other in (arrays[name], leaves(restored)[name]):
            assert (other.dtype, other.shape, other.tobytes()) == (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
    assert len(arrays) == len(leaves(params))


def test_names_are_the_paths_and_a_bfloat16_embedding_stays_one(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", random_params(tiny_model(jnp.bfloat16)), 1, "{}")
    arrays, _ = held(tmp_path / "w.safetensors")
    assert {"embedding", "head", "skip_weights", "loop.layer_1.attention.qkv", "layer_0.mlp.up"} <= arrays.keys()
    assert arrays["embedding"].dtype == jnp.bfloat16 and arrays["head"].dtype == np.float32


@pytest.mark.parametrize(("flags", "step"), [([], 4), (["--step=2"], 2)])
def test_the_newest_checkpoint_is_exported_or_that_of_a_step(flags, step, run_dir, tmp_path, capsys):
    out = export.main([str(run_dir), str(tmp_path / "w.safetensors"), *flags])
    arrays, metadata = held(out)
    np.testing.assert_array_equal(arrays["skip_weights"], np.full(2, step))
    assert metadata["step"] == str(step) and metadata["config"] == (run_dir / "config.json").read_text()
    parameters = sum(array.size for array in arrays.values())
    assert capsys.readouterr().out == f"{out}: {parameters:,} parameters, after step {step}\n"


def test_the_file_stands_for_the_run(run_dir, exported):
    """Without a preset, which it brings along: the same loss to the last bit, from the window of its step."""
    assert config_in_safetensors(exported) == read_config(run_dir / "config.json")[0]
    assert evaluate.main([str(exported), *SHORT]) == evaluate.main([str(run_dir), *SHORT])


def test_training_and_sampling_take_the_file(run_dir, exported, tmp_path):
    config, _ = read_config(run_dir / "config.json")
    model = make_model(config.model, config.dtype)
    of_file, step = load_weights(str(exported), config.model, abstract_params(model), make_mesh(1))
    of_run, same_step = load_weights(str(run_dir), config.model, abstract_params(model), make_mesh(1))
    assert step == same_step == 4
    assert {name: leaf.tobytes() for name, leaf in leaves(jax.device_get(of_file)).items()} == {
        name: leaf.tobytes() for name, leaf in leaves(jax.device_get(of_run)).items()
    }
    layers = [f"--model.layers.{name}={n}" for name, n in {"prelude": 2, "loop": 0, "visits": 0, "coda": 2}.items()]
    with pytest.raises(UserError, match=r"weights\.safetensors: embedding has shape \(50257, 16\)") as caught:
        train.main(["demo", f"--init-from={exported}", "--devices=1", *layers, f"--run-dir={tmp_path / 'run'}"])
    assert "this model needs (50257, 64)" in str(caught.value) and not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match=r"--step 2 chooses a checkpoint of a run, but .* holds one state; drop it"):
        load_weights(str(exported), config.model, abstract_params(model), make_mesh(1), step=2)


def replaced(path, **changes):
    """A copy of the file at `path` with other tensors; None drops one."""
    arrays, metadata = held(path)
    metadata |= changes.pop("metadata", {})
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    save_file(arrays, path.with_name("w.safetensors"), metadata)
    return path.with_name("w.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": None}, "lacks head; is it a checkpoint of another --preset"),
        ({"extra": np.zeros(2, np.float32)}, "holds extra, unknown to this model"),
        ({"head": np.zeros((3, 4), np.float32)}, r"head has shape \(3, 4\), this model needs \(16, 50304\)"),
        ({"skip_weights": np.zeros(2, np.int32)}, "skip_weights is of type int32, not floating-point weights"),
        ({"metadata": {"step": "-1"}}, "call the step '-1', not a number; export it again"),
        ({"metadata": {"config": "[1"}}, "the config in its metadata is not a JSON object; export it again"),
        ({"metadata": {"config": '{"steps": "x"}'}}, r"w\.safetensors: field \w+ is missing"),
    ],
)
def test_a_file_of_other_weights_is_refused_in_one_line(changes, message, exported):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main([str(replaced(exported, **changes)), *SHORT])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"",
        lambda content: b"PK\x03\x04" + bytes(1000),
        lambda content: content.replace(b'"F32"', b'"F8_E4M3"', 1),
    ],
    ids=["cut", "in the header", "empty", "other", "type"],
)
def test_a_damaged_file_is_refused_in_one_line(damage, exported, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(
        UserError, match=r"bad\.safetensors cannot be read as a safetensors file: .*; copy or export it"
    ):
        evaluate.main([str(path), *SHORT])


def test_weights_without_a_configuration_take_that_of_the_preset(exported, tmp_path, monkeypatch):
    arrays, metadata = held(exported)
    save_file(arrays, tmp_path / "plain.safetensors")
    config = config_in_safetensors(exported)
    assert config_in_safetensors(tmp_path / "plain.safetensors") is None
    monkeypatch.setattr(evaluate, "preset", {"demo": config}.__getitem__)
    loss = evaluate.main([str(tmp_path / "plain.safetensors"), "--preset=demo", *SHORT])
    assert loss == evaluate.main([str(exported), *SHORT])
    assert json.loads(metadata["config"])["preset"] == "demo"


@pytest.mark.parametrize(
    ("out", "flags", "message"),
    [
        ("weights.bin", [], r"weights\.bin: .* let it end in \.safetensors"),
        ("nowhere/w.safetensors", [], "there is no folder .*nowhere; make it first"),
        ("w.safetensors", ["--step=3"], "--step 3: .* holds no checkpoint of this step; it holds: 2, 4"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(out, flags, message, run_dir, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export.main([str(run_dir), str(tmp_path / out), *flags])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_existing_file_is_left_as_it_is(run_dir, tmp_path):
    (tmp_path / "w.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"w\.safetensors exists already; choose another name, or delete it"):
        export.main([str(run_dir), str(tmp_path / "w.safetensors")])
    with pytest.raises(UserError, match=r"config\.json cannot be read .*; give the folder of a run"):
        export.main([str(tmp_path), str(tmp_path / "new.safetensors")])
    assert (tmp_path / "w.safetensors").read_text() == "precious"
