"""Attention that is narrower or wider than the residual stream: the formulas, shapes, counts, and what is refused."""

import functools

import few_tokens
import jax
import jax.numpy as jnp
import numpy as np
import oracle_variants
import oracles
import pytest
from attention_alone import check_by_formula, tokens_with_documents
from few_tokens import COLUMNS, TOKENS
from oracle_variants import slope, with_dimensions_of_the_token_before
from oracles import random_tokens, visible_pairs
from tiny import TINY, random_params, random_sequences, tiny_model

from senano_jax import train
from senano_jax.config import LayerSchedule, OwnOptimizer, changed
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import from_torch, to_torch, torch_names
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.model.config import check_model
from senano_jax.model.schedule import Weighted
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import preset
from senano_jax.profiling.flops import attention_flops_per_pair, step_flops
from senano_jax.training.mesh import DATA_AXIS, make_mesh, place_batch
from senano_jax.training.state import init_state
from senano_jax.training.step import make_train_step

# Heads of 8, 12 and 20: no width here is a multiple of another, so that no wrong one passes for a reshape.
DIM, HEADS, NARROW, WIDE = 48, 4, 32, 80
LENGTH = 128
few_tokens = pytest.fixture(few_tokens.few_tokens)
PIECES = {
    "paired_heads": (1,),
    "values_from_x0": (0, 1),
    "head_gate": True,
    "exclusive_attention": True,
    "key_offset": "all",
    "query_gains": True,
}


def model_of(attention_dim: int | None, **changes):
    """Two layers, of which pieces pair the heads of the second one."""
    sizes = {"dim": DIM, "num_heads": HEADS, "attention_dim": attention_dim, "layers": LayerSchedule(1, 0, 0, 1)}
    return tiny_model(**(sizes | {"attention": "dense"} | changes))


def attention(
    w, x, first_v, visible, heads, visit=0, *, x0_v=0.0, table=None, key_offset=False, paired=False, gain=1.0
):
    """As that of oracle_variants, which only knows one width, but one head or pair of heads at a time. `table` is the
    tokens' value embeddings, [T, H, K]; the gate reads x without its gain."""
    length, width = len(x), w["out"].shape[0] // heads
    q, k, v = (gain * x @ matrix for matrix in w["qkv"])
    q, k, v = (np.stack([z[:, h * width : (h + 1) * width] for h in range(heads)], axis=1) for z in (q, k, v))
    v = v + x0_v
    if "value_lambdas" in w:
        v = w["value_lambdas"][0] * v + (0 if table is None else w["value_lambdas"][1] * table)
    elif first_v is not None:
        share = w["value_residual"] if np.ndim(w["value_residual"]) == 0 else w["value_residual"][visit]
        v = (1 - share) * v + share * first_v

    y = np.zeros_like(v)
    for group in [(h, h + heads // 2) for h in range(heads // 2)] if paired else [(h,) for h in range(heads)]:
        # Rows of one sequence: those of the token's first head, of its second one, of the next token's first head, ..
        z_q, z_k, z_v = (z[:, group].reshape(-1, 1, width) for z in (q, k, v))
        z_q, z_k = (oracles.rotary(oracles.norm(z)) for z in (z_q, z_k))
        if "query_gains" in w:
            z_q = z_q * np.tile([w["query_gains"][visit][h] for h in group], length)[:, None, None]
        if key_offset:
            z_k = with_dimensions_of_the_token_before(z_k)
        weights = np.where(visible, np.exp(0.12 * z_q[:, 0] @ z_k[:, 0].T), 0)
        y[:, group] = (weights @ z_v[:, 0] / weights.sum(-1, keepdims=True)).reshape(length, len(group), width)

    added = 0
    for h in range(heads):
        of_head, own = y[:, h], v[:, h]
        if "exclusive" in w:
            along = (of_head * own).sum(-1) / (own**2).sum(-1)
            of_head = of_head - np.tanh(w["exclusive"]["strength"][visit, h]) * along[:, None] * own
        if "head_gate" in w:
            of_head = of_head / (1 + np.exp(-x[:, :12] @ w["head_gate"]["gate"][visit, h]))[:, None]
        added = added + of_head @ w["out"][h * width : (h + 1) * width]
    return added, v


@pytest.mark.parametrize(("attention_dim", "layer"), [(NARROW, 2), (WIDE, 1)], ids=["narrow", "wide, paired"])
def test_attention_is_that_of_the_formula(attention_dim, layer, monkeypatch):
    """Output, values and the derivative by everything that goes in, in the second visit of a layer of the loop."""
    monkeypatch.setattr("attention_alone.expected_attention", attention)
    monkeypatch.setattr("attention_alone.LENGTH", LENGTH)
    config = model_of(attention_dim, **{**PIECES, "values_from_x0": (1, 2)}, layers=LayerSchedule(1, 2, 2, 1)).config
    check_by_formula(config, layer, tokens_with_documents(3, 100), visit=1)


def test_the_formula_is_that_of_the_other_oracle_at_one_width():
    """Else the two could be wrong in the same way: here, and in what it is held against."""
    rng = np.random.default_rng(0)
    x, first_v = rng.standard_normal((32, DIM)), rng.standard_normal((32, HEADS, DIM // HEADS))
    w = {"qkv": rng.standard_normal((3, DIM, DIM)), "out": rng.standard_normal((DIM, DIM)), "value_residual": 0.3}
    w |= {"query_gains": rng.standard_normal((1, HEADS)), "head_gate": {"gate": rng.standard_normal((1, HEADS, 12))}}
    for options in ({"key_offset": True, "gain": rng.standard_normal(DIM)}, {"paired": True}):
        seen = visible_pairs(np.arange(32), 1, slots=2 if "paired" in options else 1)
        ours, other = (f(w, x, first_v, seen, HEADS, 0, **options) for f in (attention, oracle_variants.attention))
        for a, b in zip(ours, other):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


BY_CHANNEL = Weighted(added_by_channel=True, read_by_channel=True)
MODELS = {
    "narrow": (NARROW, {**PIECES, "trunk": Weighted()}),
    "wide, with tables": (WIDE, {**PIECES, "trunk": BY_CHANNEL, "value_embeddings": 1}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("few_tokens")
def test_loss_and_gradients_of_a_model_are_those_of_the_formulas(name, monkeypatch):
    """In every tensor, over several documents; the second layer, whose heads are paired, is applied twice."""
    attention_dim, changes = MODELS[name]
    layers = (1, 1, 2, 0)
    sizes = {"layers": LayerSchedule(*layers), "vocab_size": TOKENS, "padded_vocab_size": COLUMNS}
    model = model_of(attention_dim, **sizes, **changes)
    c, rng = model.config, np.random.default_rng(0)
    inputs, targets = random_tokens(rng, LENGTH, 0.03, TOKENS - 1), rng.integers(0, TOKENS, LENGTH)
    assert np.count_nonzero(inputs == TOKENS - 1) > 1
    params, cap = random_params(model), c.cap.at_width(DIM)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: model.apply({"params": p}, inputs[None], targets[None], 1))(params)

    def by_formula(params):
        x0, of_heads = oracles.norm(params["embedding"][inputs]), (LENGTH, HEADS, -1)

        def attend(w, x, first_v, visible, heads, visit, gain=1.0):
            n = 0 if w is params["layer_0"]["attention"] else 1
            given = {"gain": gain, "x0_v": (x0 @ params[f"x0_values_{n}"]).reshape(of_heads)}
            if c.value_embeddings:  # one table, for the first layer and the last
                given["table"] = params["value_embedding_0"][inputs].reshape(of_heads)
            if n in c.paired_heads:
                visible = visible_pairs(inputs, 1, slots=2)
            given |= {"paired": n in c.paired_heads, "key_offset": n not in c.paired_heads}
            return attention(w, x, first_v, visible, heads, visit, **given)

        monkeypatch.setattr(oracle_variants, "attention", attend)
        return oracle_variants.loss(
            params, inputs, targets, 1, [1.0], layers=layers, heads=HEADS,
            cap=(cap.height, cap.divisor, cap.shift), coda_reads_exit=False, norms_loop=False,
        )  # fmt: skip

    value, gradients = run(params)
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    assert float(value) == pytest.approx(by_formula(params64), rel=1e-6)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        gradient = np.asarray(gradient, np.float64)
        direction = rng.standard_normal(gradient.shape)
        error = abs((gradient * direction).sum() - slope(by_formula, params64, [key.key for key in path], direction))
        assert error <= 2e-4 * np.linalg.norm(gradient), jax.tree_util.keystr(path)


def test_the_width_of_the_stream_is_what_none_means_bit_for_bit():
    """Initial weights of the same seed, loss and gradients. Nothing is zero: matrices that write into the stream begin
    with random numbers, and the head is the embedding."""
    results, tokens = [], random_sequences(1, LENGTH)
    pieces = {**PIECES, "paired_heads": (), "values_from_x0": (0,), "value_embeddings": 1, "trunk": Weighted()}
    for attention_dim in (None, DIM):
        layers = LayerSchedule(1, 0, 0, 0)
        model = model_of(attention_dim, tied=True, output_init=0.5, layers=layers, **pieces)
        assert model.config.head_dim == DIM // HEADS
        loss = functools.partial(model.apply, inputs=tokens[:, :-1], targets=tokens[:, 1:], window_blocks=1)
        params = jax.jit(model.init)(jax.random.key(3), tokens[:, :-1], tokens[:, 1:], 1)["params"]
        results.append((params, jax.jit(jax.value_and_grad(lambda p, loss=loss: loss({"params": p})))(params)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    params, (_, gradients) = results[0]
    for tree in (params["layer_0"]["attention"], gradients["layer_0"]["attention"]):
        assert np.all(np.any(tree["qkv"] != 0, (1, 2))) and np.any(tree["out"] != 0)


@pytest.mark.parametrize(("attention_dim", "parameters"), [(NARROW, 124_021), (WIDE, 171_637)])
def test_parameters_have_these_shapes_and_no_others_change(attention_dim, parameters):
    """Beside what depends on the width A of attention, 4 x 48 A in each of two layers, twice 48 A for values from the
    embedding and 512 A for those by token, there are 512 x 48 in the embedding, 48 x 640 in the head, 2 x 48 x 192 in
    each MLP, and small ones: 4 of the trunk and a skip, two lambdas, four gains and gates of 4 x 12 in each layer, and
    four strengths in the one without pairs."""
    D, A = DIM, attention_dim
    changes = {**PIECES, "value_embeddings": 1}
    model = model_of(A, **changes)
    assert model.config.head_dim == A // HEADS
    params, plain = abstract_params(model), abstract_params(model_of(None, **changes))
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    expected = {"value_embedding_0": (512, A), "x0_values_0": (D, A), "x0_values_1": (D, A)}
    for layer in ("layer_0", "layer_1"):
        expected |= {f"{layer}/attention/qkv": (3, D, A), f"{layer}/attention/out": (A, D)}
    for (path, leaf), before in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(plain), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.shape == expected.get(name, before.shape), name
        assert (leaf.shape != before.shape) == (name in expected), name
    assert count_parameters(params) == parameters


@pytest.mark.parametrize(("attention_dim", "flops"), [(NARROW, 208_896), (WIDE, 264_192)])
def test_flops_are_those_by_hand(attention_dim, flops):
    """Three applications, each of 2 x 3 x 48 A + 2 A x 48 in attention (12,288 of 32, 30,720 of 80) and 2 x 2 x 48 x
    192 in the MLP (36,864), and a head of 2 x 48 x 640 (61,440). Layer 0 is applied once, layer 1 twice."""
    A, tokens = attention_dim, np.ones((1, 256), np.int32)
    pieces = {"paired_heads": (1,), "values_from_x0": (0, 1)}
    models = {"trunk": Weighted(), "layers": LayerSchedule(1, 1, 2, 0)}
    config, other = (model_of(A, **models, **more).config for more in ({}, pieces))
    assert attention_flops_per_pair(config) == 4 * A
    # One document: 32,896 pairs in a long window, 2 x 8,256 in a short one; of slots 4 x 8,256 in a short one.
    ours, with_pieces = (step_flops(model, tokens, 2, training=False) for model in (config, other))
    assert ours.matrix_products == 256 * flops
    assert ours.attention == 4 * A * (32_896 + 2 * 16_512)
    assert with_pieces.matrix_products == 256 * (flops + 2 * (2 * DIM * A))  # once for all visits
    assert with_pieces.attention == 4 * A * 32_896 + 2 * A * 2 * 33_024


@pytest.fixture(scope="module")
def trained():
    """Losses and gradient norms of three steps, and attention in two layers of the candidate, before and after them.

    Wider than the stream: queries and keys are cut into square parts, values are not square."""
    config = preset("tied-recurrent")
    small = {"dim": 32, "attention_dim": 64, "num_heads": HEADS, "layers": LayerSchedule(2, 0, 0, 0)}
    small |= {"paired_heads": (1,), "vocab_size": TINY.vocab_size, "padded_vocab_size": TINY.padded_vocab_size}
    small |= {"attention": "dense", "output_init": 0.7}
    config = changed(config, {f"model.{name}": value for name, value in small.items()})
    # Without decay, which moves weights that have no gradient too.
    config = changed(config, {"optimizer.matrices.query_key_columns": 32, "optimizer.matrices.decay": 0.0})
    model, mesh = make_model(config.model, "float32"), make_mesh(1)
    optimizer = make_optimizer(config.optimizer, config.steps, DATA_AXIS)
    state, step = init_state(model, optimizer, 0, mesh), make_train_step(model, optimizer, mesh)
    batch, losses, trees = place_batch(mesh, random_sequences(2, 256), 1), [], [jax.tree.map(np.array, state.params)]
    for _ in range(3):
        state, metrics = step(state, batch, 2, jnp.asarray([1.0, 0.5, 0.25]))
        losses.append([float(value) for value in metrics])
    trees.append(jax.tree.map(np.array, state.params))
    return losses, *([tree["layer_0"]["attention"], tree["layer_1"]["attention"]] for tree in trees)


def test_initial_deviations_are_by_what_a_matrix_reads(trained):
    """The width of the stream for queries, keys and values, that of attention for its output: uniform both."""
    for matrices in trained[1]:
        expected = [(m, 0.5 / 32**0.5) for m in matrices["qkv"]] + [(matrices["out"], 0.7 / 64**0.5)]
        for matrix, deviation in expected:
            assert abs(matrix.mean()) < 5 * deviation / matrix.size**0.5
            assert matrix.std() == pytest.approx(deviation, rel=0.05)
            assert 0.99 < np.abs(matrix).max() / (3**0.5 * deviation) <= 1 + 1e-6


def test_the_recipe_of_the_tied_recurrent_candidate_trains_it(trained):
    losses, before, after = trained
    assert np.all(np.isfinite(losses)) and losses[-1][0] < losses[0][0]
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        for name, shape in {"qkv": (3, 32, 64), "out": (64, 32)}.items():
            assert new[name].shape == shape
            assert np.all(np.isfinite(new[name]))
            assert np.mean(new[name] != old[name]) > 0.99, (layer, name)


def test_there_is_a_flag():
    assert train.parse_request(["demo"]).config.model.attention_dim is None
    assert train.parse_request(["demo", "--model.attention-dim=48"]).config.model.attention_dim == 48
    assert train.parse_request(["demo", "--model.attention-dim", "None"]).config.model.attention_dim is None


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dim": 0}, r"--model\.attention-dim is 0; it must be at least 1"),
        ({"attention_dim": -96}, r"--model\.attention-dim is -96; it must be at least 1"),
        ({"attention_dim": 508}, r"--model\.attention-dim (is )?508\b.*--model\.num-heads 6\b.*; "),
        ({"attention_dim": 36}, r"--model\.attention-dim (is )?36\b.*--model\.num-heads 6\b.* of 6;.* multiple of 4"),
        ({"attention_dim": 576, "attention": "flash"}, r"--model\.attention flash .*\b96\b.*--model\.attention-dim.*;"),
    ],
    ids=str,
)
def test_widths_that_cannot_work_are_refused(changes, message):
    """With a stream of 768, which its six heads divide well."""
    config = changed(preset("recurrent"), {f"model.{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=message):
        check_config(config)
    assert refusal(check_config, config) == refusal(check_model, config.model)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dim": 576},
        {"attention_dim": 384, "attention": "flash"},
        {"attention_dim": 768, "dim": 576, "attention": "flash"},
        {"attention_dim": 640, "num_heads": 5},
    ],
    ids=str,
)
def test_only_the_width_of_attention_is_cut_into_heads(changes):
    """Where it is given, the stream's may be what it likes."""
    check_config(changed(preset("recurrent"), {f"model.{name}": value for name, value in changes.items()}))


def test_columns_cut_together_must_divide_the_width_of_attention():
    """Not that of the stream, as the check of a run says before there is a model; without a width, the stream's."""
    flag = "optimizer.matrices.query_key_columns"
    config = changed(preset("tied-recurrent"), {"model.dim": 768, "model.num_heads": 6})
    for width, columns in ((1536, 256), (960, 320), (768, 256), (None, 384), (576, None)):
        check_config(changed(config, {"model.attention_dim": width, flag: columns}))
    for width, columns in ((960, 256), (1536, 320), (None, 512), (384, 768)):
        message = refusal(check_config, changed(config, {"model.attention_dim": width, flag: columns}))
        assert message.startswith(f"--optimizer.matrices.query-key-columns is {columns}; it must divide the ")
        assert f" {width or 768} columns" in message


def test_optimisers_that_cut_nothing_are_left_alone():
    config = changed(preset("recurrent"), {"model.attention_dim": 576})
    for changes in ({"optimizer.matrices": config.optimizer.head}, {"optimizer": OwnOptimizer("sgd", "")}):
        check_config(changed(config, changes))


@pytest.mark.parametrize("attention_dim", [16, 64])
def test_the_pytorch_program_has_no_such_model(attention_dim):
    config = tiny_model(attention_dim=attention_dim).config
    for convert in (lambda: to_torch({}, config), lambda: from_torch({}, config, {}, "weights.pt")):
        message = refusal(convert)
        assert message.startswith(f"--model.attention-dim is {attention_dim}, which the PyTorch program does not have")


def test_the_pytorch_program_has_the_model_of_one_width():
    assert torch_names(tiny_model(attention_dim=TINY.dim).config) == torch_names(TINY)
