"""The arrays that the PyTorch program computed, and the weights and tokens it was given."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from senano_jax.config import ModelConfig
from senano_jax.interop.torch_checkpoint import from_torch, torch_names
from senano_jax.model.gpt import Gpt
from senano_jax.presets import preset

FOLDER = Path(__file__).parent / "data"


@dataclasses.dataclass
class Reference:
    """One .npz: `meta` is what the program recorded, `arrays` its leading entries of tensors."""

    meta: dict
    arrays: dict[str, np.ndarray]
    config: ModelConfig
    dtype: jnp.dtype
    params: dict

    @property
    def model(self) -> Gpt:
        return Gpt(self.config, self.dtype)

    def sequences(self, first: int, count: int) -> np.ndarray:
        """[count, T + 1] consecutive sequences of the token stream."""
        T = self.meta["T"]
        return np.stack([self.arrays["tokens"][k * T : k * T + T + 1] for k in range(first, first + count)])

    def torch_view(self, tree) -> dict[str, np.ndarray]:
        """A tree of parameters or gradients under PyTorch's names and in its layout, float32."""
        view = {}
        for name, path in torch_names(self.config).items():
            node = tree
            for key in path:
                node = node[key]
            array = np.asarray(node, np.float32)
            transposed = path[-1] in ("head", "qkv", "out", "up", "down")
            view[name] = np.swapaxes(array, -1, -2) if transposed else array
        return view


@functools.cache
def load(name: str) -> Reference:
    """Read once for each name, so never donate its parameters."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    meta = json.loads(str(arrays.pop("meta")))
    base = preset("no-value-embeddings" if meta["plain"] else "recurrent").model
    config = dataclasses.replace(base, dim=meta["dim"], num_heads=meta["heads"])
    dtype = jnp.dtype("bfloat16" if meta["embed_bf16"] else "float32")
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    abstract = jax.eval_shape(Gpt(config, dtype).init, jax.random.key(0), tokens, tokens, 1)["params"]
    weights = _weights(meta, config, abstract)
    return Reference(meta, arrays, config, dtype, from_torch(weights, config, abstract, name))


def _weights(meta, config, abstract) -> dict[str, np.ndarray]:
    """The recipe by which the weights were made: a seeded normal for each name, scaled by its kind."""
    weights = {}
    for i, name in enumerate(meta["param_names_sorted"]):
        node = abstract
        path = torch_names(config)[name]
        for key in path:
            node = node[key]
        shape = node.shape
        if path[-1] in ("head", "qkv", "out", "up", "down"):
            shape = (*shape[:-2], shape[-1], shape[-2])
        x = np.random.RandomState(1000 * meta["seed"] + i).standard_normal(shape or 1).astype(np.float32)
        x = x.reshape(shape)
        if name == "embed.weight":
            weights[name] = x
        elif name == "lm_head.weight":
            weights[name] = np.zeros_like(x) if meta["zero_init"] else x
        elif name == "skip_weights":
            weights[name] = 1 + 0.1 * x
        elif name.endswith("lambdas"):
            weights[name] = np.array([1, 0], np.float32) + 0.1 * x
        elif name.endswith("lamb"):
            weights[name] = 0.5 + 0.1 * x
        elif name.endswith("c_proj.weight") and meta["zero_init"]:
            weights[name] = np.zeros_like(x)
        else:
            weights[name] = 0.5 * x / np.sqrt(shape[-1]).astype(np.float32)
    return weights
