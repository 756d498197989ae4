"""Weights under the names of PyTorch programs, and their checkpoint files.

The record's systems have the names of their own programs, GPT-2 has those that its releases made usual. A matrix of
PyTorch is (out, in) and ours is (in, out); nothing else differs but the names.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from senano_jax.config import Gpt2Config, ModelConfig
from senano_jax.errors import UserError
from senano_jax.files import expand_home, write_atomically
from senano_jax.interop.tensor_names import check_names

_TOP_LEVEL = {
    "embed.weight": ("embedding",),
    "lm_head.weight": ("head",),
    "skip_weights": ("skip_weights",),
}
_OF_BLOCK = {
    "attn.qkv_w": ("attention", "qkv"),
    "attn.c_proj.weight": ("attention", "out"),
    "mlp.c_fc.weight": ("mlp", "up"),
    "mlp.c_proj.weight": ("mlp", "down"),
    "lambdas": ("lambdas",),
}
_OF_GPT2_BLOCK = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention", "qkv"),
    "attn.c_proj": ("attention", "out"),
    "ln_2": ("mlp_norm",),
    "mlp.c_fc": ("mlp", "up"),
    "mlp.c_proj": ("mlp", "down"),
}
_WRAPPERS = re.compile(r"^((_orig_mod|module|transformer)\.)+")
_STATE_DICTS = ("model", "model_state_dict", "state_dict")  # keys that training programs keep theirs under
TRANSPOSED = ("head", "qkv", "out", "up", "down", "kernel")  # ends of the paths of matrices


# What the PyTorch programs compute in one way only.
_FIXED = (
    "trunk",
    "mlp_widths",
    "cap",
    "tied",
    "head_gate",
    "exclusive_attention",
    "difference",
    "key_offset",
    "paired_heads",
)


def torch_names(config: ModelConfig | Gpt2Config) -> dict[str, tuple[str, ...]]:
    """PyTorch name -> path in our parameter tree, for every parameter of the model.

    Raises UserError for a model that no PyTorch program has.
    """
    if isinstance(config, Gpt2Config):
        return _gpt2_names(config)
    plain = ModelConfig(dim=config.dim, num_heads=config.num_heads, layers=config.layers)
    for field in _FIXED:
        if getattr(config, field) != getattr(plain, field):
            raise UserError(
                f"--model.{field.replace('_', '-')} is {getattr(config, field)}, which the PyTorch program does not "
                "have, so weights cannot go to it or come from it; use a run folder"
            )
    return _gpt_names(config)


def _gpt2_names(config: Gpt2Config) -> dict[str, tuple[str, ...]]:
    modules = {"ln_f": ("final_norm",)}
    for n in range(config.num_layers):
        modules |= {f"h.{n}.{name}": (f"layer_{n}", *path) for name, path in _OF_GPT2_BLOCK.items()}
    names = {"wte.weight": ("embedding",), "wpe.weight": ("position_embedding",)}
    for name, path in modules.items():
        weight = "scale" if path[-1].endswith("norm") else "kernel"
        names |= {f"{name}.weight": (*path, weight), f"{name}.bias": (*path, "bias")}
    return names


def _gpt_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    layers = config.layers
    names = dict(_TOP_LEVEL)
    names |= {f"value_embeds.{n}.weight": (f"value_embedding_{n}",) for n in range(config.value_embeddings)}
    if config.value_embeddings:
        of_block = _OF_BLOCK | {"attn.lambdas": ("attention", "value_lambdas")}
    else:
        of_block = _OF_BLOCK | {"attn.lamb": ("attention", "value_residual")}
    for n in range(layers.layers):
        layer = ("loop", f"layer_{n}") if layers.in_loop(n) else (f"layer_{n}",)
        for name, path in of_block.items():
            if path[0] != "attention" or n not in layers.no_attention:
                names[f"blocks.{n}.{name}"] = layer + path
    return names


def from_torch(arrays: Mapping[str, np.ndarray], config: ModelConfig | Gpt2Config, abstract_params, source: str):
    """Our parameter tree from PyTorch-named arrays.

    Args:
      arrays: by PyTorch name, with or without the prefixes of a compiled (`_orig_mod.`) or distributed (`module.`)
        module; those of GPT-2 also with a prefix `transformer.`, and with its head, which must be its embedding.
      config: the model the arrays must fit.
      abstract_params: its parameter tree of shapes and dtypes, as `jax.eval_shape` gives it.
      source: where the arrays come from, for messages.

    Returns: a tree like `abstract_params`, of NumPy arrays.
    Raises: UserError naming the tensors that are missing, left over or of another shape.
    """
    arrays = {_WRAPPERS.sub("", name): array for name, array in arrays.items()}
    head = arrays.pop("lm_head.weight", None) if isinstance(config, Gpt2Config) else None
    if head is not None and not np.array_equal(head, arrays.get("wte.weight")):
        raise UserError(f"{source}: lm_head.weight differs from wte.weight; this model has one table for both")
    names = torch_names(config)
    check_names(source, names, arrays)
    params: dict = {}
    for name, path in names.items():
        array = _other_layout(np.asarray(arrays[name]), path)
        expected = _get(abstract_params, path)
        if array.shape != expected.shape:
            wanted = expected.shape
            if path[-1] in TRANSPOSED:
                wanted = (*wanted[:-2], wanted[-1], wanted[-2])
            raise UserError(f"{source}: {name} has shape {np.shape(arrays[name])}, this model needs {tuple(wanted)}")
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.ascontiguousarray(array).reshape(array.shape).astype(expected.dtype)
    return params


def to_torch(params, config: ModelConfig | Gpt2Config) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: PyTorch-named arrays from our parameter tree, in its types."""
    return {name: _other_layout(np.asarray(_get(params, path)), path) for name, path in torch_names(config).items()}


def read_torch_checkpoint(path: str) -> dict[str, np.ndarray]:
    """Tensors of a .pt file by name: a state dict, or one under a key of _STATE_DICTS. Never unpickles objects.

    bfloat16 tensors come back as float32 (NumPy has no such type), which loses nothing.
    Raises: UserError if torch is not installed, or the file is absent, unreadable or of another kind.
    """
    given, path = path, str(expand_home(path))
    try:
        if not Path(path).is_file():
            raise UserError(f"{given} is not a file; give a PyTorch checkpoint (.pt)")
        with open(path, "rb") as file:
            begins = file.read(2)
        if not begins or (begins == b"PK" and not zipfile.is_zipfile(path)):
            raise UserError(
                f"{path} cannot be read as a PyTorch checkpoint: it is {'cut short' if begins else 'empty'}; "
                "copy or save it again"
            )
    except (OSError, ValueError) as error:  # a name that is too long, or is none
        raise UserError(f"{path[:200]!r} is not a file ({error}); give a PyTorch checkpoint (.pt)") from None
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs PyTorch; run: pip install 'senano-jax[torch]'") from None
    file_bytes = Path(path).stat().st_size
    try:
        if _unpacked_bytes(path) > file_bytes:
            raise ValueError("its members are compressed, which torch.save does not do")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged or unsafe file
        reason = re.sub(r"\s+", " ", str(error)).split(". ")[0][:150]
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint of plain tensors: {reason}") from None
    if isinstance(content, dict):
        content = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no state dict (a dictionary of tensors, or one under the key 'model')")
    if inner := [key for key, value in content.items() if isinstance(value, dict) and value]:
        raise UserError(
            f"{path} has dictionaries under {', '.join(map(_quoted, inner[:3]))}, none of them under "
            f"{', '.join(map(repr, _STATE_DICTS))}; save the state dict alone, or under 'model'"
        )
    arrays, expected_bytes = {}, 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path}: entry {_quoted(name)} is not a tensor of floating-point weights")
        expected_bytes += tensor.numel() * tensor.element_size()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or expected_bytes > 4 * file_bytes:
            raise UserError(f"{path}: entry {_quoted(name)} is not a tensor that the file holds the elements of")
        arrays[name] = tensor.detach().float().numpy()
    return arrays


def write_torch_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], step: int) -> None:
    """Writes {"step": step, "model": state dict} as a .pt file, whole or not at all; bfloat16 stays bfloat16.

    Raises UserError if torch is not installed or the file cannot be written.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"writing {path} needs PyTorch; run: pip install 'senano-jax[torch]'") from None

    def tensor(array: np.ndarray):
        is_bfloat16 = array.dtype == jnp.bfloat16
        array = np.array(array, order="C")  # a copy that torch may own
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)

    content = io.BytesIO()
    torch.save({"step": step, "model": {name: tensor(array) for name, array in arrays.items()}}, content)
    write_atomically(path, content.getbuffer())


def _unpacked_bytes(path: str) -> int:
    """What the members of a zip file say they unpack to; 0 for a file of the older format."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as file:
        return sum(member.file_size for member in file.infolist())


def _quoted(name: object) -> str:
    return repr(name)[:100] if isinstance(name, str | int) else f"under a {type(name).__name__}"


def _other_layout(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """A matrix of the parameter at `path` from (out, in) to (in, out) or back."""
    return np.swapaxes(array, -1, -2) if path[-1] in TRANSPOSED and array.ndim >= 2 else array


def _get(tree, path):
    for key in path:
        tree = tree[key]
    return tree
