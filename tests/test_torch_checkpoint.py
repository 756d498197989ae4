"""The PyTorch project's checkpoint files: what comes back from them, what goes into them, what is refused how."""

import jax
import numpy as np
import pytest
from tiny import random_params, tiny_gpt2, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import (
    from_torch,
    read_torch_checkpoint,
    to_torch,
    torch_names,
    write_torch_checkpoint,
)
from senano_jax.model.build import abstract_params
from senano_jax.model.schedule import Weighted
from senano_jax.model.soft_cap import SoftCap

torch = pytest.importorskip("torch")

MODEL = tiny_model("bfloat16", dim=16, layers=LayerSchedule(1, 2, 2, 1), vocab_size=40, padded_vocab_size=48)
SHAPES = {"embed.weight": (40, 16), "lm_head.weight": (48, 16), "skip_weights": (3,)}
for n in range(4):
    SHAPES |= {
        f"blocks.{n}.attn.qkv_w": (3, 16, 16),
        f"blocks.{n}.attn.c_proj.weight": (16, 16),
        f"blocks.{n}.attn.lamb": (),
        f"blocks.{n}.mlp.c_fc.weight": (64, 16),
        f"blocks.{n}.mlp.c_proj.weight": (16, 64),
        f"blocks.{n}.lambdas": (2,),
    }


def state_dict():
    """As the program saves it: the embedding in bfloat16, the rest in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {"embed.weight": tensors["embed.weight"].bfloat16()}


def load(path):
    return from_torch(read_torch_checkpoint(str(path)), MODEL.config, abstract_params(MODEL), str(path))


def save(path, content):
    torch.save(content, path)
    return str(path)


def refusal(function, *arguments) -> str:
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_are_those_of_the_program():
    """One for every parameter of the model, no more."""
    assert torch_names(MODEL.config).keys() == SHAPES.keys()
    assert len(set(torch_names(MODEL.config).values())) == len(jax.tree.leaves(abstract_params(MODEL)))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"step": 7, "code": "", "model": tensors},
        lambda tensors: {"epoch": 7, "model_state_dict": tensors},
    ],
)
def test_a_saved_model_comes_back(tmp_path, prefix, wrap):
    """Compiled or distributed or neither, alone or under a usual key: the same bits, matrices transposed, in the
    layer they belong to and in the model's types."""
    tensors = state_dict()
    path = save(tmp_path / "state.pt", wrap({prefix + name: tensor for name, tensor in tensors.items()}))
    params = load(path)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(MODEL))
    for leaf, abstract in zip(jax.tree.leaves(params), jax.tree.leaves(abstract_params(MODEL))):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    for n, layer in enumerate(
        (params["layer_0"], params["loop"]["layer_1"], params["loop"]["layer_2"], params["layer_3"])
    ):
        block = {
            name.removeprefix(f"blocks.{n}."): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith(f"blocks.{n}.")
        }
        for i in range(3):
            np.testing.assert_array_equal(layer["attention"]["qkv"][i], block["attn.qkv_w"][i].T)
        np.testing.assert_array_equal(layer["attention"]["out"], block["attn.c_proj.weight"].T)
        np.testing.assert_array_equal(layer["attention"]["value_residual"], block["attn.lamb"])
        np.testing.assert_array_equal(layer["mlp"]["up"], block["mlp.c_fc.weight"].T)
        np.testing.assert_array_equal(layer["mlp"]["down"], block["mlp.c_proj.weight"].T)
        np.testing.assert_array_equal(layer["lambdas"], block["lambdas"])
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].numpy().T)
    np.testing.assert_array_equal(params["skip_weights"], tensors["skip_weights"].numpy())
    np.testing.assert_array_equal(params["embedding"].astype(np.float32), tensors["embed.weight"].float().numpy())


@pytest.mark.parametrize(
    "model",
    [
        tiny_gpt2(vocab_size=40, padded_vocab_size=48),
        tiny_model(layers=LayerSchedule(2, 0, 0, 2, no_attention=(2,)), value_embeddings=1, vocab_size=40),
    ],
)
def test_other_systems_come_back(model):
    """GPT-2, and value embeddings with a layer that has no attention: a name for every parameter, none lost."""
    params = random_params(model)
    names = to_torch(params, model.config)
    assert names.keys() == torch_names(model.config).keys()
    jax.tree.map(np.testing.assert_array_equal, from_torch(names, model.config, abstract_params(model), "here"), params)


def test_gpt2_may_bring_its_head_along():
    """As its state dicts do, in which the table occurs twice; two tables are refused."""
    model = tiny_gpt2(num_layers=1)
    names = {f"transformer.{name}": array for name, array in to_torch(random_params(model), model.config).items()}
    table = names["transformer.wte.weight"]
    params = from_torch(names | {"lm_head.weight": table}, model.config, abstract_params(model), "here")
    np.testing.assert_array_equal(params["embedding"], table)
    message = refusal(from_torch, names | {"lm_head.weight": table + 1}, model.config, abstract_params(model), "here")
    assert message.startswith("here: lm_head.weight differs from wte.weight")


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"trunk": Weighted()}, "--model.trunk is Weighted(growth=2.85, "),
        ({"mlp_widths": ((3, 64),)}, "--model.mlp-widths is ((3, 64),), which"),
        ({"cap": SoftCap(shift=5.0)}, "--model.cap is SoftCap("),
        ({"tied": True}, "--model.tied is True, which"),
        ({"head_gate": True}, "--model.head-gate is True, which"),
        ({"exclusive_attention": True}, "--model.exclusive-attention is True, which"),
        ({"difference": (1,)}, "--model.difference is (1,), which"),
        ({"paired_heads": (1,)}, "--model.paired-heads is (1,), which"),
        ({"key_offset": "long"}, "--model.key-offset is long, which"),
    ],
    ids=str,
)
def test_a_model_that_the_pytorch_program_does_not_have_is_refused(change, flag):
    model = tiny_model(**change)
    for convert in (
        lambda: to_torch(random_params(model), model.config),
        lambda: from_torch({}, model.config, abstract_params(model), "weights.pt"),
    ):
        with pytest.raises(UserError) as error:
            convert()
        assert str(error.value).startswith(flag) and "does not have" in str(error.value)


@pytest.mark.parametrize("layers", [LayerSchedule(1, 2, 2, 1), LayerSchedule(2, 0, 0, 2)], ids=["loop", "no loop"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_exported_comes_back_bit_for_bit(tmp_path, layers, dtype):
    """Every parameter, in a file with the program's names, shapes and types."""
    model = tiny_model(dtype, dim=16, layers=layers, vocab_size=40, padded_vocab_size=48)
    params = random_params(model)
    path = tmp_path / "exported.pt"
    write_torch_checkpoint(path, to_torch(params, model.config), 7)

    content = torch.load(path, weights_only=True)
    assert content["step"] == 7
    skips = {"skip_weights": (model.config.trunk.skips(layers),)}
    assert {name: tuple(tensor.shape) for name, tensor in content["model"].items()} == SHAPES | skips
    for name, tensor in content["model"].items():
        assert tensor.dtype == (getattr(torch, dtype) if name == "embed.weight" else torch.float32)
        assert tensor.is_contiguous()
    np.testing.assert_array_equal(content["model"]["blocks.2.mlp.c_fc.weight"].numpy().T, layer_2(params)["mlp"]["up"])

    again = from_torch(read_torch_checkpoint(str(path)), model.config, abstract_params(model), str(path))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for leaf, original in zip(jax.tree.leaves(again), jax.tree.leaves(params)):
        assert leaf.dtype == original.dtype and leaf.tobytes() == np.asarray(original).tobytes()


def layer_2(params):
    return params.get("layer_2") or params["loop"]["layer_2"]


def test_missing_tensors_are_named(tmp_path):
    """The first three, the number of the others, and what may be the matter."""
    tensors = state_dict()
    for n in (1, 2):
        for name in [name for name in tensors if name.startswith(f"blocks.{n}.mlp") or name == f"blocks.{n}.lambdas"]:
            del tensors[name]
    message = refusal(load, save(tmp_path / "a.pt", tensors))
    assert f"{tmp_path}/a.pt lacks blocks.1.lambdas, blocks.1.mlp.c_fc.weight, blocks.1.mlp.c_proj.weight" in message
    assert "and 3 more" in message
    assert "--preset" in message


def test_tensors_of_another_model_are_named(tmp_path):
    """Nothing is dropped silently."""
    extra = {"value_embeds.0.weight": torch.zeros(40, 16)}
    assert "holds value_embeds.0.weight" in refusal(load, save(tmp_path / "a.pt", state_dict() | extra))


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blocks.2.mlp.c_fc.weight", (16, 64), "(64, 16)"),
        ("embed.weight", (41, 16), "(40, 16)"),
        ("blocks.0.attn.lamb", (1,), "()"),
        ("skip_weights", (15,), "(3,)"),
        ("blocks.1.attn.qkv_w", (48, 16), "(3, 16, 16)"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape, wanted):
    """With both shapes in PyTorch's layout; a transposed matrix is not taken for ours."""
    message = refusal(load, save(tmp_path / "a.pt", state_dict() | {name: torch.zeros(shape)}))
    assert f"{name} has shape {shape}, this model needs {wanted}" in message


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["alone", "beside the tensors"])
def test_objects_are_refused_without_being_made(tmp_path, place):
    """A checkpoint is data: no code in it runs, also not outside `model`."""
    trap = Malicious(str(tmp_path / "executed"))
    path = save(tmp_path / "a.pt", trap if place == "alone" else {"model": state_dict(), "optimizer": trap})
    assert path in refusal(read_torch_checkpoint, path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    """Wherever it was cut, the empty file included."""
    path = tmp_path / "a.pt"
    whole = tmp_path / "whole.pt"
    save(whole, state_dict())
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    reason = refusal(read_torch_checkpoint, str(path))
    assert f"{path} cannot be read as a PyTorch checkpoint" in reason
    assert f": it is {'cut short' if share else 'empty'}; copy or save it again" in reason


def test_an_absent_file_is_named(tmp_path):
    """So is a folder."""
    for path in (tmp_path / "gone.pt", tmp_path):
        assert f"{path} is not a file" in refusal(read_torch_checkpoint, str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no state dict"),
        ([1, 2], "no state dict"),
        (torch.zeros(3), "no state dict"),
        ({"a": 1}, "entry 'a'"),
        ({"a": torch.zeros(3, dtype=torch.int32)}, "entry 'a'"),
        ({3: torch.zeros(3)}, "entry 3"),
        ({"model": {"a": "text"}}, "entry 'a'"),
        ({"epoch": 1, "net": {"a": torch.zeros(3)}}, "dictionaries under 'net', none of them under 'model', "),
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, reason):
    """A list, numbers, integers, an optimizer's state: anything but named floating-point tensors."""
    assert reason in refusal(read_torch_checkpoint, save(tmp_path / "a.pt", content))
