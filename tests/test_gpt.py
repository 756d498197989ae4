"""The model: its parameters, what may change in how it is computed, what a token can reach, and its formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import END_OF_TEXT, cross_entropies, gpt_logits, random_tokens
from tiny import random_params, random_sequences, tiny_model

from senano_jax.config import LayerSchedule
from senano_jax.interop.torch_checkpoint import from_torch
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.gpt import Gpt
from senano_jax.model.schedule import UNet, Weighted
from senano_jax.presets import preset

FRESH = tiny_model("bfloat16", dim=64, vocab_size=50257, padded_vocab_size=50304)


@pytest.mark.parametrize(
    ("name", "skips", "count"), [("recurrent", 15, 162_165_555), ("no-value-embeddings", 6, 162_165_546)]
)
def test_parameter_count_and_types(name, skips, count):
    """By shapes alone. 12 layers are stored however often they are visited; only the embedding has the run's dtype."""
    config = preset(name)
    params = abstract_params(make_model(config.model, config.dtype))
    assert count_parameters(params) == count == 50257 * 768 + 50304 * 768 + 12 * (12 * 768**2 + 3) + skips
    for path, leaf in jax.tree.leaves_with_path(params):
        assert leaf.dtype == (jnp.bfloat16 if path[-1].key == "embedding" else jnp.float32)
    float32 = abstract_params(make_model(config.model, "float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(float32)} == {jnp.dtype("float32")}


def test_value_embeddings_count_as_parameters():
    """275.6M: four tables of 50,257 rows, the head, 11 attentions and 12 MLPs, and 52 scalars: two a layer, two an
    attention, six skips."""
    config = preset("value-embeddings")
    params = abstract_params(make_model(config.model, config.dtype))
    tables, squares = 4 * 50_257 * 768, (11 * 4 + 12 * 8) * 768**2
    assert count_parameters(params) == 275_598_388 == tables + 50_304 * 768 + squares + 12 * 2 + 11 * 2 + 6
    tables = [leaf for name, leaf in params.items() if "embedding" in name]
    assert [(leaf.shape, leaf.dtype) for leaf in tables] == [((50_257, 768), jnp.dtype("bfloat16"))] * 4


@pytest.mark.parametrize("name", ["strict", "head-gate", "weighted", "depth-attention", "shifted-cap", "multi-token"])
def test_the_ladder_begins_at_or_below_162_million_parameters(name):
    """Read strictly: the last layer's MLP is 256 units narrower, which the Hopper product takes as well."""
    config = preset(name)
    count = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    gates, by_application = 72 * (6 + 6 * 4), 5 * 30 - 2 * 12 - 15 + 6 * 3
    with_queries = by_application + 31 * 768
    more = {"head-gate": gates, "weighted": by_application, "depth-attention": with_queries}.get(name, 0)
    assert count == 162_165_555 - 2 * 256 * 768 + more <= 162_000_000


def test_one_table_pays_for_five_layers_within_162_million_parameters():
    """17 layers of 12 squares of the width, the table, and numbers by application: 30 of five, a value residual each, a
    gate of 72 and, but for four paired layers, 6 strengths of exclusive attention."""
    config = preset("tied-recurrent")
    count = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    paired = 2 * 3 + 1  # applications: of layer 1 once, of 5, 9 and 13 twice
    assert count == 17 * 12 * 768**2 + 50_304 * 768 + 30 * (5 + 1 + 72) + 6 * (30 - paired)
    assert count <= 162_000_000


@pytest.mark.parametrize(("name", "queries"), [("wide-recurrent", 0), ("attnres-recurrent", 28 + 1)])
def test_wider_layers_are_fewer_within_162_million_parameters(name, queries):
    """12 layers of 12 squares of the width, the table, and numbers by application: 28 of five, a value residual each, a
    gate of 84 and 7 strengths of exclusive attention; attention over depth has a query each and one for the head."""
    config = preset(name)
    count = count_parameters(abstract_params(make_model(config.model, config.dtype)))
    assert count == 12 * 12 * 896**2 + 50_304 * 896 + 28 * (5 + 1 + 84 + 7) + queries * 896
    assert count <= 162_000_000


def test_second_queries_are_paid_for_within_162_million_parameters():
    """In eight layers a square of the width and, at three visits, a gate of 84; all MLPs are 256 narrower."""
    with_second, without = (preset(f"{name}-recurrent-ramp") for name in ("difference", "attnres"))
    count, before = (
        count_parameters(abstract_params(make_model(config.model, config.dtype))) for config in (with_second, without)
    )
    assert count - before == 8 * (896**2 + 3 * 84) - 12 * 2 * 256 * 896
    assert count <= 162_000_000


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed=0):
    tokens = jnp.zeros((1, 128), jnp.int32)
    return model.init(jax.random.key(seed), tokens, tokens, 1)["params"]


def test_initial_weights_have_the_published_statistics():
    """Embedding N(0, 1); head and projections into the residual stream zero; the other matrices uniform with bound
    sqrt(3) / 2 / sqrt(fan-in); the scalars as if skips were plain, x0 absent and values mixed half and half."""
    params = init(FRESH)
    embedding = np.asarray(params["embedding"], np.float64)
    assert abs(embedding.mean()) < 5 / math.sqrt(embedding.size)
    assert abs(embedding.std() - 1) < 5 / math.sqrt(2 * embedding.size)
    assert 4.5 < np.abs(embedding).max() < 6.5  # 3.2 million draws
    np.testing.assert_array_equal(params["head"], 0)
    np.testing.assert_array_equal(params["skip_weights"], np.ones(3))
    layers = [params["layer_0"], params["layer_3"], *params["loop"].values()]
    assert len(layers) == 4
    for layer in layers:
        np.testing.assert_array_equal(layer["lambdas"], [1, 0])
        assert layer["attention"]["value_residual"] == 0.5
        np.testing.assert_array_equal(layer["attention"]["out"], 0)
        np.testing.assert_array_equal(layer["mlp"]["down"], 0)
        for matrix in (*layer["attention"]["qkv"], layer["mlp"]["up"]):
            bound = math.sqrt(3) * 0.5 / math.sqrt(64)
            assert 0.99 * bound < np.abs(matrix).max() <= bound
            assert float(matrix.mean()) == pytest.approx(0, abs=5 * bound / math.sqrt(3 * matrix.size))
            assert float(matrix.std()) == pytest.approx(0.5 / math.sqrt(64), rel=0.05)


def test_no_two_matrices_start_equal_and_seeds_differ():
    """Layers of the loop and q, k, v each draw their own weights; another seed draws all of them anew."""
    drawn = []
    for seed in (0, 1):
        params = init(tiny_model(), seed)
        layers = [params["layer_0"], params["layer_3"], *params["loop"].values()]
        drawn += [params["embedding"][:32, :32], *(m for layer in layers for m in layer["attention"]["qkv"])]
        drawn += [layer["mlp"]["up"][:, :32] for layer in layers]
    flat = np.stack([np.ravel(m) for m in drawn])
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlations).max() < 6 / math.sqrt(flat.shape[1])


def test_a_fresh_model_loses_the_logarithm_of_the_padded_vocabulary():
    """Its head is zero: every token costs ln 50304, 10.8258."""
    sequences = random_sequences(1, 128)
    loss = jax.jit(FRESH.apply)({"params": init(FRESH)}, sequences[:, :-1], sequences[:, 1:], 1)
    assert float(loss) / 128 == pytest.approx(math.log(50304), rel=1e-6)


LOOPED = {"layers": LayerSchedule(1, 2, 4, 1)}


@functools.cache
def loss_and_gradients(**changes):
    model, sequences = tiny_model(**LOOPED, **changes), random_sequences(2, 256)

    def loss(params):
        return model.apply({"params": params}, sequences[:, :-1], sequences[:, 1:], 2)

    return jax.jit(jax.value_and_grad(loss))(random_params(tiny_model(**LOOPED)))


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "attention"}, {"remat": "full"}], ids=str)
def test_how_it_is_computed_does_not_change_the_result(change):
    """Scanned or unrolled, kept or recomputed: the same initial weights, the same loss and gradients up to rounding.

    Not the same bits: the compiler fuses an unrolled visit, and a recomputation, with other neighbours.
    """
    expected_loss, expected = loss_and_gradients()
    loss, gradients = loss_and_gradients(**change)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for gradient, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(gradient, other, rtol=0, atol=5e-6 * np.linalg.norm(other))
    jax.tree.map(np.testing.assert_array_equal, init(tiny_model(**LOOPED, **change)), init(tiny_model(**LOOPED)))


@pytest.mark.parametrize("trunk", [UNet(), Weighted(), Weighted(depth_block=1)], ids=str)
def test_recomputing_changes_bits_in_bfloat16_alone(trunk):
    """With skip connections a recomputed layer takes a stream that is rounded to bfloat16, where the compiler may keep
    float32 between two layers that it sees together; the weighted trunk rounds it at every layer."""
    changes = LOOPED | {"trunk": trunk}
    sequences, losses = random_sequences(2, 256), {}
    for dtype in ("float32", "bfloat16"):
        for remat in ("none", "full"):
            model = tiny_model(dtype, remat=remat, **changes)
            variables = {"params": random_params(tiny_model(dtype, **changes))}
            losses[dtype, remat] = float(jax.jit(model.apply)(variables, sequences[:, :-1], sequences[:, 1:], 2))
    assert losses["float32", "full"] == losses["float32", "none"]
    rounded_anyway = isinstance(trunk, Weighted)
    assert (losses["bfloat16", "full"] == losses["bfloat16", "none"]) == rounded_anyway
    assert losses["bfloat16", "full"] == pytest.approx(losses["bfloat16", "none"], rel=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def sensitivity(model, params, tokens_T, position, window_blocks):
    """[T] largest derivative of a random projection of the features at `position` by the embedding of each token.

    Tokens are all different, so that a row of the embedding table is one input.
    """
    cotangent = jax.random.normal(jax.random.key(0), (model.config.dim,))

    def projection(embedding):
        variables = {"params": params | {"embedding": embedding}}
        return model.apply(variables, tokens_T[None], window_blocks, method=Gpt.features)[0, position] @ cotangent

    return jnp.abs(jax.grad(projection)(params["embedding"])[tokens_T]).max(axis=1)


LENGTH = 384
# END_OF_TEXT needs the whole embedding; the head may be narrow, as long as targets are.
READER = tiny_model(vocab_size=50257)
PIECES = {"head_gate": True, "exclusive_attention": True, "paired_heads": (1,)}
READERS = {
    "skips": READER,
    "depth attention": tiny_model(vocab_size=50257, trunk=Weighted(depth_block=1)),
    "head gate": tiny_model(vocab_size=50257, head_gate=True),
    "difference": tiny_model(vocab_size=50257, difference=(1, 2)),
    "pieces": tiny_model(vocab_size=50257, num_heads=4, **PIECES),
    "weighted pieces": tiny_model(vocab_size=50257, num_heads=4, trunk=Weighted(), remat="full", **PIECES),
}


def test_pieces_leave_the_initial_weights_of_all_others_as_they_are():
    """So that a model with one and a model without begin alike, whatever else is drawn."""

    def initial(**changes):
        model, tokens = tiny_model(num_heads=4, **changes), jnp.zeros((1, 128), jnp.int32)
        return dict(jax.tree.leaves_with_path(jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]))

    plain, with_pieces = initial(), initial(**PIECES, key_offset="all", difference=(2,))
    # Gates, strengths but where heads are paired, second queries and their gate.
    assert len(with_pieces) == len(plain) + 4 + 3 + 2
    for path, weights in plain.items():
        np.testing.assert_array_equal(with_pieces[path], weights, jax.tree_util.keystr(path))


def different_tokens(boundary=None):
    """int32 [LENGTH], all different; END_OF_TEXT at `boundary` only."""
    tokens = np.random.default_rng(1).permutation(50256)[:LENGTH].astype(np.int32)
    if boundary is not None:
        tokens[boundary] = END_OF_TEXT
    return tokens


CAUSAL = READERS | {"one token back": tiny_model(vocab_size=50257, key_offset="all")}


@pytest.mark.parametrize("reader", CAUSAL)
@pytest.mark.parametrize("position", [0, 1, 127, 128, 200, LENGTH - 1])
def test_features_depend_on_all_tokens_up_to_theirs_and_on_none_after(position, reader):
    """Causality of the whole model by its gradient, for one document and a window over everything.

    The features at t must depend on token t (the residual stream) and on every token before it (attention reaches all
    of them), so those derivatives are not zero. No token after t may enter: its derivative is zero exactly, not small,
    because what is hidden has weight zero in every sum.
    """
    model = CAUSAL[reader]
    slopes = sensitivity(model, random_params(model), different_tokens(), position, 6)
    np.testing.assert_array_equal(slopes > 0, np.arange(LENGTH) <= position)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("boundary", [1, 128, 200])
@pytest.mark.parametrize("offset", [-1, 0, 1, 50])
def test_nothing_crosses_the_start_of_a_document(boundary, offset, reader):
    """Of two documents in a sequence, a token's features depend on its own one: positions run on, values, skips and
    the shared first values do not mix. END_OF_TEXT is of the second."""
    position, index = boundary + offset, np.arange(LENGTH)
    model = READERS[reader]
    slopes = sensitivity(model, random_params(model), different_tokens(boundary), position, 6)
    same_document = (index < boundary) == (position < boundary)
    np.testing.assert_array_equal(slopes > 0, same_document & (index <= position))


def test_the_window_bounds_what_all_layers_together_reach():
    """With windows of one block nothing leaves a block, however many layers there are; with long windows of two and
    short ones of one block, three long positions of the six reach three blocks back, here the start."""
    params, index = random_params(READER), np.arange(LENGTH)
    for window_blocks, first in ((1, 256), (2, 0)):
        slopes = sensitivity(READER, params, different_tokens(), 300, window_blocks)
        np.testing.assert_array_equal(slopes > 0, (first <= index) & (index <= 300))


def pytorch_weights(config, rng):
    """By the PyTorch program's names and shapes, (out, in), all of them random."""
    D, F = config.dim, 4 * config.dim
    weights = {
        "embed.weight": rng.standard_normal((config.vocab_size, D)),
        "lm_head.weight": rng.standard_normal((config.padded_vocab_size, D)),
        "skip_weights": 1 + 0.3 * rng.standard_normal(config.trunk.skips(config.layers)),
    }
    for n in range(config.layers.layers):
        weights |= {
            f"blocks.{n}.attn.qkv_w": rng.standard_normal((3, D, D)) / D**0.5,
            f"blocks.{n}.attn.c_proj.weight": rng.standard_normal((D, D)) / D**0.5,
            f"blocks.{n}.attn.lamb": 0.5 + 0.3 * rng.standard_normal(),
            f"blocks.{n}.mlp.c_fc.weight": rng.standard_normal((F, D)) / D**0.5,
            f"blocks.{n}.mlp.c_proj.weight": rng.standard_normal((D, F)) / F**0.5,
            f"blocks.{n}.lambdas": np.array([1, 0.2]) + 0.2 * rng.standard_normal(2),
        }
    return {name: np.asarray(array, np.float32) for name, array in weights.items()}


@pytest.mark.parametrize(
    ("layers", "schedule"),
    [
        (LayerSchedule(1, 2, 2, 1), [0, 1, 2, 1, 2, 3]),
        (LayerSchedule(1, 2, 4, 1), [0, 1, 2, 1, 2, 1, 2, 1, 2, 3]),
        (LayerSchedule(2, 2, 2, 2), [0, 1, 2, 3, 2, 3, 4, 5]),
        (LayerSchedule(2, 0, 0, 2), [0, 1, 2, 3]),
    ],
    ids=["looped twice", "looped four times", "two layers before", "no loop"],
)
def test_logits_and_loss_are_those_of_the_formulas(layers, schedule):
    """Against the model written position by position in float64 NumPy: skips, lambdas, value residual, rotary,
    windows by parity, documents, soft cap."""
    rng = np.random.default_rng(0)
    model = tiny_model(layers=layers, vocab_size=50257)
    weights = pytorch_weights(model.config, rng)
    params = from_torch(weights, model.config, abstract_params(model), "test")
    inputs, targets = random_tokens(rng, LENGTH, 0.004), rng.integers(0, 640, LENGTH)

    @jax.jit
    def run(params, window_blocks):
        variables = {"params": params}
        logits = model.apply(variables, inputs[None], window_blocks, method=Gpt.logits)
        return logits[0], model.apply(variables, inputs[None], targets[None], window_blocks)

    for window_blocks in (2, 5):
        logits, loss = run(params, window_blocks)
        expected = gpt_logits(weights, inputs, window_blocks, schedule, heads=2)
        np.testing.assert_allclose(logits, expected, atol=1e-3)
        assert float(loss) == pytest.approx(cross_entropies(expected, targets).sum(), rel=1e-5)
