"""Residual streams side by side, of which layers read mixtures: the model against float64 NumPy, and its properties."""

import functools
import math

import few_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_tokens import COLUMNS, TOKENS
from oracle_variants import attention, mlp, slope
from oracles import cross_entropies, norm, random_tokens, visible_pairs
from tiny import random_params, random_sequences, tiny_model

from senano_jax.attention import intervals
from senano_jax.config import LayerSchedule
from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, count_parameters
from senano_jax.model.gpt import Gpt
from senano_jax.model.schedule import Weighted
from senano_jax.optim.groups import parameter_group
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch, replicated
from senano_jax.training.state import TrainState
from senano_jax.training.step import make_train_step

LENGTH = 128
LANE_WEIGHTS = ("lane_read", "lane_kept", "lane_written")
few_tokens = pytest.fixture(few_tokens.few_tokens)


def trunk(lanes, **changes):
    return Weighted(between="layer-lanes", lanes=lanes, **changes)


def in_turn(readers, lanes):
    """Lane weights as a fresh model has them."""
    read = np.zeros((readers, lanes), np.float32)
    read[np.arange(readers), np.arange(readers) % lanes] = 1
    kept = np.stack([np.eye(lanes, dtype=np.float32)] * readers)
    return dict(zip(LANE_WEIGHTS, (read, kept, np.ones_like(read)), strict=True))


def mixture(weights, lanes):
    return sum(weight * lane for weight, lane in zip(weights, lanes, strict=True))


def expected_loss(params, inputs, targets, config, visits):
    """In float64 NumPy, application by application: the first `visits` of the loop, with lanes from layer to layer or,
    as `between` says, from visit to visit."""
    layers, chosen = config.layers, config.trunk
    visible = visible_pairs(inputs, 1)
    x0 = norm(params["embedding"][inputs])
    read, kept, written = (params[name] for name in LANE_WEIGHTS)
    first_v = None

    def through_layer(x, position, n, visit):
        nonlocal first_v
        in_loop = layers.prelude <= n < layers.prelude + layers.loop
        weights = (params["loop"] if in_loop else params)[f"layer_{n}"]
        stream, added = params["stream_weights"][position], params["added_weights"][position]
        y, v = attention(weights["attention"], norm(x), first_v, visible, config.num_heads, visit)
        first_v = v if position == 0 else first_v
        x = stream[0] * x + added[0] * y + params["x0_weights"][position] * x0
        return stream[1] * x + added[1] * mlp(weights["mlp"], x)

    def after(lanes, at, adds):
        return [mixture(kept[at, i], lanes) + written[at, i] * adds for i in range(len(lanes))]

    end = layers.prelude + layers.loop
    before = [(n, n, 0) for n in range(layers.prelude)]
    of_visits = [
        [(layers.prelude + k * layers.loop + j, layers.prelude + j, k) for j in range(layers.loop)]
        for k in range(visits)
    ]
    coda = [(layers.positions - layers.layers + n, n, 0) for n in range(end, layers.layers)]
    if chosen.between == "layer-lanes":
        lanes = [x0] * chosen.lanes
        for position, n, visit in (*before, *(one for of_visit in of_visits for one in of_visit), *coda):
            u = mixture(read[position], lanes)
            lanes = after(lanes, position, through_layer(u, position, n, visit) - u)
        x = sum(lanes)
    else:
        x = x0
        for one in before:
            x = through_layer(x, *one)
        lanes = [x] * chosen.lanes
        for k in range(visits):
            x = mixture(read[k], lanes)
            for one in of_visits[k]:
                x = through_layer(x, *one)
            lanes = after(lanes, k, norm(x))
        x = sum(lanes)
        for one in coda:
            x = through_layer(x, *one)
    logits = 30 / (1 + np.exp(-(norm(x) @ params["head"]) / (7.5 * math.sqrt(config.dim))))
    return cross_entropies(logits, targets).sum()


# Of each: lanes, layers, visits that are computed, other changes of the trunk, and of the model.
CASES = {
    "two of three visits": (3, LayerSchedule(1, 2, 3, 2), 2, {}, {}),
    "unrolled": (2, LayerSchedule(1, 1, 2, 0), 2, {}, {"unroll": True, "remat": "full"}),
    "one lane, no loop": (1, LayerSchedule(2, 0, 0, 1), 0, {}, {}),
    "from visit to visit": (3, LayerSchedule(1, 1, 3, 0), 2, {"between": "lanes"}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("few_tokens")
def test_loss_and_gradients_are_those_of_the_formulas(case):
    """With random weights, over several documents; gradients of each tensor of the lanes, and of all others together.

    All lanes that the first layer reads are equal, so that it has one gradient for them; weights that are left out have
    none at all.
    """
    lanes, layers, visits, of_trunk, of_model = CASES[case]
    chosen = Weighted(**{"between": "layer-lanes", "lanes": lanes} | of_trunk)
    model = tiny_model(layers=layers, trunk=chosen, vocab_size=TOKENS, padded_vocab_size=COLUMNS, **of_model)
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, LENGTH, 0.02, TOKENS - 1), rng.integers(0, TOKENS, LENGTH)
    assert np.count_nonzero(inputs == TOKENS - 1) > 1
    params = random_params(model)

    def run(params):
        fewer = {"visits": visits} if visits < layers.visits and layers.loop else {}
        return model.apply({"params": params}, inputs[None], targets[None], 1, **fewer)

    value, gradients = jax.jit(jax.value_and_grad(run))(params)
    gradients = jax.tree.map(lambda x: np.asarray(x, np.float64), gradients)
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def by_formula(params):
        return expected_loss(params, inputs, targets, model.config, visits)

    assert float(value) == pytest.approx(by_formula(params64), rel=1e-6)
    for name in LANE_WEIGHTS:
        direction = rng.standard_normal(gradients[name].shape)
        error = abs((gradients[name] * direction).sum() - slope(by_formula, params64, [name], direction))
        assert error <= 2e-4 * np.linalg.norm(gradients[name]), name
    others = {name: leaf for name, leaf in params64.items() if name not in LANE_WEIGHTS}
    directions = jax.tree.map(lambda x: rng.standard_normal(x.shape), others)
    products = jax.tree.map(lambda g, d: (g * d).sum(), {name: gradients[name] for name in others}, directions)

    def along(by):
        return by_formula(params64 | jax.tree.map(lambda x, d: x + by * d, others, directions))

    step = 1e-6
    error = abs(sum(jax.tree.leaves(products)) - (along(step) - along(-step)) / (2 * step))
    assert error <= 2e-4 * math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))

    used = np.ones(len(params["lane_read"]), bool)
    first, of_visit = (0, 1) if chosen.between == "lanes" else (layers.prelude, layers.loop)
    used[first + of_visit * visits : first + of_visit * layers.visits] = False
    for name in LANE_WEIGHTS:
        assert np.all(gradients[name][used]) and not np.any(gradients[name][~used]), name
    np.testing.assert_allclose(gradients["lane_read"][0], gradients["lane_read"][0, 0], rtol=1e-4)


HALVES = LayerSchedule(1, 1, 2, 1)  # four applications


def features_of(model, tokens):
    """Function of weights that replace random ones: the features that the head reads, jitted."""
    apply = jax.jit(functools.partial(model.apply, method=Gpt.features))
    return lambda **weights: np.float32(apply({"params": random_params(model) | weights}, tokens, 1))


def test_lanes_begin_as_one_stream():
    """However many: what the head reads of equal lanes is that of the trunk without; other weights change it."""
    tokens, rng = random_sequences(2, 127), np.random.default_rng(0)
    stream = tiny_model(trunk=Weighted(), layers=HALVES)
    ones = jnp.ones((4, 2))  # large beside what is random, so that roundings stay small
    params = random_params(stream) | {"stream_weights": ones, "added_weights": ones}
    expected = features_of(stream, tokens)(**params)
    for lanes in (1, 2, 3):
        features, start = features_of(tiny_model(trunk=trunk(lanes), layers=HALVES), tokens), in_turn(4, lanes)
        np.testing.assert_allclose(features(**params, **start), expected, rtol=0, atol=3e-5)
        for name in LANE_WEIGHTS:
            other = {name: start[name] * np.float32(rng.uniform(-1, 1, start[name].shape))}
            assert np.abs(features(**params | start | other) - expected).max() > 0.1, name


@pytest.mark.parametrize(
    ("between", "readers"), [("layer-lanes", 4), ("lanes", 2)], ids=["from layer to layer", "from visit to visit"]
)
def test_a_fresh_model_reads_the_lanes_in_turn_keeps_all_and_writes_to_all(between, readers):
    """In float32 whatever the activations are; the scalars' rule moves them. Two lanes are the default."""
    model = tiny_model("bfloat16", trunk=Weighted(between=between, lanes=3), layers=HALVES)
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens, 1)["params"]
    for name, start in in_turn(readers, 3).items():
        assert params[name].dtype == jnp.float32
        np.testing.assert_array_equal(params[name], start, name)
        assert parameter_group((jax.tree_util.DictKey(name),)) == "scalars"
    plain = abstract_params(tiny_model(trunk=Weighted(), layers=HALVES))
    assert not plain.keys() & set(LANE_WEIGHTS)
    two = abstract_params(tiny_model(trunk=Weighted(between=between), layers=HALVES))
    for lanes, shapes in ((3, params), (2, two)):
        assert count_parameters(shapes) == count_parameters(plain) + readers * (2 * lanes + lanes**2)


@pytest.fixture(scope="module")
def in_bfloat16():
    """Features of a model with two lanes, computed in bfloat16, for weights that replace random ones."""
    return features_of(tiny_model("bfloat16", trunk=trunk(2), layers=HALVES), random_sequences(1, 127))


def test_layers_read_a_rounded_mixture_and_what_they_add_is_added_to_that(in_bfloat16):
    """A mixture that rounds to another one gives the same features, to the bit. And layers that return what they read
    add nothing, however much of it is written: not what rounding took away."""
    only = {"lane_kept": np.float32([np.eye(2)] * 4), "lane_written": np.float32([[64, 0]] * 4)}
    features = in_bfloat16(lane_read=np.float32([[0, 1]] * 4), **only)
    np.testing.assert_array_equal(in_bfloat16(lane_read=np.float32([[0, 1 + 2**-12]] * 4), **only), features)
    assert np.any(in_bfloat16(lane_read=np.float32([[0, 1 + 2**-7]] * 4), **only) != features)

    nothing = {"stream_weights": np.ones((4, 2)), "added_weights": np.zeros((4, 2)), "x0_weights": np.zeros(4)}
    nothing = jax.tree.map(np.float32, nothing | {"lane_read": np.full((4, 2), 1 / 3)})
    features = in_bfloat16(lane_written=np.zeros((4, 2), np.float32), **nothing)
    np.testing.assert_array_equal(in_bfloat16(lane_written=np.full((4, 2), 256, np.float32), **nothing), features)


def test_a_large_lane_keeps_the_small_things_that_are_added(in_bfloat16):
    """Neither lanes nor what is added to them are rounded: bfloat16 numbers above 1 are 2^-7 apart. Three layers double
    what they read, always the embedding, and add what is 2^-8 as large, be it by their weight or by the lane's. The
    last one takes the embedding away from the lane; what is left is as large as if it had never been small."""
    ones, kept, written = np.ones((4, 1)), np.stack([np.eye(2)] * 4), np.float32([[1, 0]] * 3 + [[0, 0]])

    def features(by_layer, by_lane):
        kept[3] = np.float32([[1, -1 - 3 * by_lane], [0, 0]]) / (by_layer * by_lane)
        weights = {
            "lane_read": ones * [0, 1],
            "lane_kept": kept,
            "lane_written": by_lane * written,
            "stream_weights": ones * [2, 1],
            "added_weights": ones * [0, by_layer],  # MLPs alone: what they add is proportional to their weight
            "x0_weights": np.zeros(4),
        }
        return in_bfloat16(**jax.tree.map(np.float32, weights))

    expected = features(1, 1)
    assert np.abs(expected).max() > 1
    for shares in ((2**-8, 1), (1, 2**-8)):
        np.testing.assert_allclose(features(*shares), expected, rtol=2**-7, atol=2e-3)


def test_features_depend_on_their_document_up_to_their_token_and_on_nothing_else(monkeypatch):
    """Derivatives of the features at a position by the embedding of each token, one document or two: not zero for all
    tokens of its document up to it, exactly zero for all others. Tokens are all different, so that a row of the table
    is one input."""
    model, length = tiny_model(trunk=trunk(2), layers=HALVES), 256
    end_of_text = model.config.vocab_size - 1
    monkeypatch.setattr(intervals, "END_OF_TEXT", end_of_text)
    params, index = random_params(model), np.arange(length)

    @jax.jit
    def slopes(tokens, position):
        def projection(embedding):
            variables = {"params": params | {"embedding": embedding}}
            features = model.apply(variables, tokens[None], length // 64, method=Gpt.features)
            return features[0, position] @ jax.random.normal(jax.random.key(0), (model.config.dim,))

        return jnp.abs(jax.grad(projection)(params["embedding"])[tokens]).max(axis=1)

    for boundary, positions in {0: (0, 1, 127, 128, 255), 1: (0, 1, 2), 128: (127, 128, 140), 200: (199, 250)}.items():
        tokens = np.random.default_rng(1).permutation(end_of_text)[:length].astype(np.int32)
        tokens[boundary] = end_of_text
        for position in positions:
            same_document = (index < boundary) == (position < boundary)
            np.testing.assert_array_equal(slopes(tokens, position) > 0, same_document & (index <= position))


LAYER_LANES = {"between": "layer-lanes"}


@pytest.mark.parametrize(
    ("named", "loop", "changes"),
    [
        ("lanes is 0", 2, LAYER_LANES | {"lanes": 0}),
        ("lanes is -1", 0, LAYER_LANES | {"lanes": -1}),
        ("lanes is 0", 2, {"between": "lanes", "lanes": 0}),
        ("lanes is 0", 2, {"lanes": 0}),
        ("lanes is 3, but ", 2, {"lanes": 3}),
        ("lanes is 1, but ", 0, {"lanes": 1}),
        ("lanes is 3, but ", 2, {"between": "norm", "lanes": 3}),
        ("between lanes needs a loop", 0, {"between": "lanes"}),
        ("exits", 2, LAYER_LANES | {"exits": True}),
        ("coda-reads-exit", 2, LAYER_LANES | {"coda_reads_exit": True}),
    ],
)
def test_what_cannot_work_is_refused_by_name(named, loop, changes):
    """And what wants a stream of the loop, by both names."""
    with pytest.raises(UserError, match=f"--model.trunk.{named}") as refusal:
        Weighted(**changes).check(LayerSchedule(1, loop, loop, 1))
    if "lanes" not in named:
        assert "--model.trunk.between layer-lanes" in str(refusal.value)


def test_lanes_from_layer_to_layer_need_no_loop_and_may_be_any_number():
    for lanes in (1, 2, 5):
        for layers in (LayerSchedule(1, 2, 2, 1), LayerSchedule(2, 0, 0, 1)):
            trunk(lanes).check(layers)
        Weighted(between="lanes", lanes=lanes, exits=True).check(LayerSchedule(1, 2, 2, 1))


def test_a_step_of_training_moves_every_weight_of_the_lanes():
    """By the scalars' rate, which is Adam's first step whatever the gradient."""
    recipe, mesh, layers = preset("recurrent").optimizer, make_mesh(1), LayerSchedule(1, 0, 0, 1)
    model, optimizer = tiny_model("bfloat16", trunk=trunk(2), layers=layers), make_optimizer(recipe, 10, DATA_AXIS)
    params = jax.tree.map(np.array, random_params(model) | in_turn(2, 2))
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    batch = place_batch(mesh, random_sequences(2, 128), 1)
    state, metrics = make_train_step(model, optimizer, mesh)(jax.device_put(state, replicated(mesh)), batch, 1)
    assert np.isfinite(float(metrics.loss))
    for name, start in in_turn(2, 2).items():
        np.testing.assert_allclose(np.abs(state.params[name] - start), recipe.scalars.rate, rtol=1e-3)
