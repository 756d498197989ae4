"""The attention of one layer by itself: held against float64 NumPy, and asked what it depends on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracle_variants import attention as expected_attention
from oracles import END_OF_TEXT, visible_pairs

from senano_jax.attention import document_start, window_intervals
from senano_jax.config import ModelConfig
from senano_jax.model.context import Context
from senano_jax.model.layer import Layer
from senano_jax.model.pieces.paired_heads import slots_of
from senano_jax.model.rotary import rotary_tables

LENGTH, WINDOW = 256, 2


class Inputs(NamedTuple):
    """All that attention reads of one sequence."""

    params: dict
    x: jax.Array  # [T, D]
    first_v: jax.Array  # [T, H, K]


def tokens_with_documents(*starts: int) -> np.ndarray:
    """int32 [LENGTH]; documents begin at `starts`, beside the one at 0."""
    tokens = np.arange(LENGTH, dtype=np.int32)
    tokens[list(starts)] = END_OF_TEXT
    return tokens


def random_inputs(config: ModelConfig, layer: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((LENGTH, config.dim)), jnp.float32)
    heads = (LENGTH, config.num_heads, config.head_dim)
    first_v = jnp.asarray(rng.standard_normal(heads), jnp.float32)

    def drawn(leaf):
        drawn = rng.standard_normal(leaf.shape) / (leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 1)
        return jnp.asarray(drawn, jnp.float32)

    module = Layer(config, layer)
    context = _context(config, np.zeros(LENGTH, np.int32), Inputs({}, x, first_v))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x[None], context, 0, method=Layer.attend))
    return Inputs(jax.tree.map(drawn, shapes["params"]["attention"]), x, first_v)


def attention(config: ModelConfig, layer: int, tokens: np.ndarray, inputs: Inputs, visit=0):
    """What attention adds, [T, D], and the values that it weighs, [T, H, K]."""
    context = _context(config, tokens, inputs)
    params = {"params": {"attention": inputs.params}}
    y, v = Layer(config, layer).apply(params, inputs.x[None], context, visit, method=Layer.attend)
    return y[0], v[0]


def _context(config: ModelConfig, tokens: np.ndarray, inputs: Inputs) -> Context:
    starts = document_start(jnp.asarray(tokens)[None])
    windows = {True: window_intervals(starts, WINDOW), False: window_intervals(starts, WINDOW // 2)}
    rotary, slots = rotary_tables(LENGTH, config.head_dim), slots_of(starts, WINDOW, config.head_dim)
    x0, first_v = jnp.zeros_like(inputs.x)[None], inputs.first_v[None]
    return Context(x0, first_v, (), rotary, windows, slots)


def check_by_formula(config: ModelConfig, layer: int, tokens: np.ndarray, visit: int = 0) -> None:
    """Output, values, and their derivative along one direction of everything that goes in."""
    inputs, rng = random_inputs(config, layer), np.random.default_rng(1)
    paired, window = layer in config.paired_heads, WINDOW if config.layers.has_long_window(layer) else WINDOW // 2
    seen = visible_pairs(tokens, window, slots=2 if paired else 1)
    options = {"key_offset": config.offsets_keys(layer), "paired": paired}

    def by_formula(inputs):
        return expected_attention(inputs.params, inputs.x, inputs.first_v, seen, config.num_heads, visit, **options)

    weights = [rng.standard_normal(shape) for shape in (inputs.x.shape, inputs.first_v.shape)]
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)

    @jax.jit
    def run(inputs):
        results = attention(config, layer, tokens, inputs, visit)
        return sum((w * r).sum() for w, r in zip(weights, results)), results

    (_, results), gradients = jax.value_and_grad(run, has_aux=True)(inputs)
    for result, expected in zip(results, by_formula(exact)):
        np.testing.assert_allclose(result, expected, atol=2e-5 * np.abs(expected).max())

    def projected(inputs):
        return sum((w * r).sum() for w, r in zip(weights, by_formula(inputs)))

    for name, gradient in jax.tree.leaves_with_path(gradients):
        direction, step = rng.standard_normal(gradient.shape), 1e-5
        above, below = (projected(_moved(exact, name, by * direction)) for by in (step, -step))
        error = abs((np.asarray(gradient, np.float64) * direction).sum() - (above - below) / (2 * step))
        assert error < 2e-4 * np.linalg.norm(gradient), jax.tree_util.keystr(name)


def _moved(inputs: Inputs, name: tuple, by: np.ndarray) -> Inputs:
    return jax.tree.map_with_path(lambda path, x: x + by if path == name else x, inputs)


def dependence(config: ModelConfig, layer: int, tokens: np.ndarray, positions: tuple[int, ...]) -> np.ndarray:
    """Bool [len(positions), T]: which tokens of the layer's input what attention adds at each position depends on, by
    derivatives that are not exactly 0."""
    inputs = random_inputs(config, layer)
    cotangent = jax.random.normal(jax.random.key(0), (config.dim,))

    @jax.jit
    def slopes(inputs):
        _, pull_back = jax.vjp(lambda x: attention(config, layer, tokens, inputs._replace(x=x))[0], inputs.x)
        at = jnp.zeros((len(positions), *inputs.x.shape)).at[jnp.arange(len(positions)), jnp.array(positions)]
        return jax.vmap(lambda g: pull_back(g)[0])(at.set(cotangent))

    return np.abs(slopes(inputs)).max(-1) > 0
