"""Models small enough to compile in seconds, with random weights in every tensor."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from senano_jax.config import Gpt2Config, LayerSchedule, ModelConfig
from senano_jax.model.build import Model, abstract_params, make_model
from senano_jax.model.gpt import Gpt
from senano_jax.model.gpt2 import Gpt2
from senano_jax.presets import demo
from senano_jax.runlog.writer import RunFolder
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.state import TrainState

TINY = ModelConfig(
    dim=32, num_heads=2, layers=LayerSchedule(1, 2, 2, 1), vocab_size=512, padded_vocab_size=640, attention="banded"
)

TINY_GPT2 = Gpt2Config(
    dim=32, num_heads=2, num_layers=2, max_length=256, vocab_size=500, padded_vocab_size=512, attention="banded"
)


def tiny_model(dtype=jnp.float32, **changes) -> Gpt:
    return Gpt(dataclasses.replace(TINY, **changes), jnp.dtype(dtype))


def tiny_gpt2(dtype=jnp.float32, **changes) -> Gpt2:
    return Gpt2(dataclasses.replace(TINY_GPT2, **changes), jnp.dtype(dtype))


@functools.cache
def random_params(model: Model, seed: int = 0):
    """Weights none of which is zero or trivial: a fresh model would hide what its zero matrices multiply.

    Made once for each model and seed, so never donate them.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim < 2:
            x = 0.5 + 0.2 * x
        elif "embedding" not in path[-1].key and path[-1].key != "head":
            x = x / np.sqrt(leaf.shape[-2])
        return jnp.asarray(x, leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(model))


def random_sequences(count: int, length: int, seed: int = 0, vocabulary: int = TINY.vocab_size) -> np.ndarray:
    """int32 [count, length + 1]."""
    return np.random.default_rng(seed).integers(0, vocabulary, (count, length + 1)).astype(np.int32)


def small_run(path: Path, steps: tuple[int, ...]) -> Path:
    """The folder of a run that never ran: random weights, saved after each of `steps`, which skip_weights hold too."""
    model = dataclasses.replace(demo().model, dim=16, layers=LayerSchedule(2, 0, 0, 2))
    config = dataclasses.replace(demo(), model=model, steps=max(steps), compilation_cache=None)
    params = random_params(make_model(config.model, config.dtype))
    with RunFolder(path) as run, Checkpoints(path / "checkpoints") as checkpoints:
        run.start(config, "demo", 0)
        for step in steps:
            params = params | {"skip_weights": jnp.full(model.trunk.skips(model.layers), step, jnp.float32)}
            checkpoints.save(step, TrainState(jnp.int32(step), params, ()), {"step": step})
    return path
