"""What a token begins with, as one more prediction: the table, the loss, the plan, and a run with it."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults.comparison import records, state_of
from pieces_reference import largest_error, reference
from resumed_runs import assert_same_bits
from test_tokenize_text import write_tables
from tiny import random_params, random_sequences, tiny_gpt2, tiny_model

from senano_jax import train
from senano_jax.config import LayerSchedule, Stage, changed
from senano_jax.config_check import check_config
from senano_jax.data.prefixes import longest_prefixes, read_prefixes
from senano_jax.data.vocabulary import END_OF_TEXT, VOCAB_SIZE
from senano_jax.errors import UserError
from senano_jax.model.elementwise import norm
from senano_jax.model.loss import cross_entropy
from senano_jax.model.soft_cap import SoftCap
from senano_jax.model.targets import Prefixes, targets_of
from senano_jax.plan import Plan
from senano_jax.presets import PRESETS, demo, preset
from senano_jax.training.wiring import wire

GPT2_TABLES = Path(__file__).parents[1] / "data" / "gpt2"


def by_comparing_all(texts: list[bytes], size: int) -> list[int]:
    """Every token with every other one."""
    table = [-1] * size
    for number, text in enumerate(texts):
        begins = [other for other in texts if other != text and text.startswith(other)]
        table[number] = texts.index(max(begins, key=len)) if begins else -1
    return table


def test_the_longest_token_that_each_begins_with():
    """An invented vocabulary of two letters, with gaps, in any order: a longer token may have the smaller number."""
    rng = np.random.default_rng(0)
    texts = sorted({bytes(rng.choice([97, 98], rng.integers(1, 9))) for _ in range(120)})
    texts = [texts[n] for n in rng.permutation(len(texts))]
    table = longest_prefixes({text: number for number, text in enumerate(texts)}, len(texts) + 5)
    assert table.dtype == np.int32
    assert table.tolist() == by_comparing_all(texts, len(texts) + 5)
    assert len(set(table.tolist())) > 10


def test_the_table_of_a_folder(tmp_path):
    """The bytes and the end of a text begin with no token; `hello` with `hell`, that with `he`."""
    table = read_prefixes(str(write_tables(tmp_path / "bpe")), VOCAB_SIZE)
    assert table.shape == (VOCAB_SIZE,)
    numbers = json.loads((tmp_path / "bpe/encoder.json").read_text())
    begins = {"he": "h", "ll": "l", "hell": "he", "hello": "hell", "Ġw": "Ġ"}
    assert {token: table[numbers[token]] for token in begins} == {t: numbers[p] for t, p in begins.items()}
    assert (table >= 0).sum() == len(begins) and table[END_OF_TEXT] == -1


@pytest.mark.skipif(not GPT2_TABLES.is_dir(), reason="needs GPT-2's tables in data/gpt2")
def test_the_table_of_gpt2_is_the_original_one():
    table = read_prefixes(str(GPT2_TABLES), VOCAB_SIZE)
    assert (table < 0).sum() == 257
    digest = hashlib.sha256(table.astype("<i4").tobytes()).hexdigest()
    assert digest == "4ca9d79796b4a5756a57b6f4447946e5d6027c807b3fc3c037a2fa37c7bd87b6"


def test_the_loss_is_the_original_one():
    """With three tokens ahead, over the whole vocabulary; the numbers of automatic differentiation."""
    inputs, arrays = reference("a_head_prefix")
    table = np.full(VOCAB_SIZE, -1, np.int32)
    table[inputs["y"]] = arrays["prefix_target"]
    prefixes = Prefixes(jnp.asarray(table), jnp.float32(0.25))
    targets = targets_of(jnp.asarray(inputs["y"])[None], jnp.float32([1, 0.5, 0.25]), prefixes)
    assert targets.tokens.shape == (1, 32, 4)
    cap = SoftCap(height=23, divisor=7.5, shift=5, by_width=False)

    def loss(x, head):
        return cross_entropy(norm(x)[None], head, targets, cap, chunk_tokens=16)

    value, (d_x, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(inputs["x"], inputs["W"])
    assert float(value) == pytest.approx(float(arrays["loss"].sum()), rel=2e-6)
    assert largest_error(d_x, arrays["d_x"]) < 1e-5
    assert largest_error(d_head[:, arrays["cols"]], arrays["d_W_cols"]) < 1e-5
    assert float(jnp.linalg.norm(d_head)) == pytest.approx(float(arrays["d_W_norm"]), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "columns"),  # that are in the softmax
    [(tiny_model(layers=LayerSchedule(1, 0, 0, 1)), 640), (tiny_gpt2(num_layers=1), 500)],
    ids=["gpt", "gpt2"],
)
def test_a_model_adds_the_loss_of_prefixes(model, columns):
    """Which is that of the prefixes in place of the next tokens, where there are any; its weight compiles nothing."""
    params, sequences = random_params(model), random_sequences(1, 128, vocabulary=500)
    table = jnp.asarray(np.random.default_rng(1).integers(-200, 300, model.config.vocab_size), jnp.int32)
    inputs, following = sequences[:, :-1], sequences[:, 1:]

    @jax.jit
    def loss(weight, loss_weights=None):
        given = {"params": params}, inputs, following, 2
        return model.apply(*given, loss_weights=loss_weights, prefixes=Prefixes(table, weight))

    logits = np.asarray(model.apply({"params": params}, inputs, 2, method="logits"), np.float64)[0, :, :columns]
    begins = np.asarray(table)[following[0]]
    logsumexp = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
    has = begins >= 0
    expected = (logsumexp - logits[np.arange(128), begins])[has].sum()
    assert 20 < has.sum() < 110
    for weights in ((), (np.float32([1, 0.5]),)):
        without, half = (float(loss(np.float32(weight), *weights)) for weight in (0, 0.5))
        assert half - without == pytest.approx(expected / 2, rel=1e-4)
    plain = jax.jit(model.apply)({"params": params}, inputs, following, 2)
    assert float(loss(np.float32(0))) == pytest.approx(float(plain), rel=1e-6)
    assert loss._cache_size() == 2


def test_the_weight_moves_through_its_stage():
    """A quarter for a third of the run, then less and less; none after that, in the same program."""
    config = preset("prefix")
    plan = Plan(config)
    first, second, third = plan.stages
    assert [float(plan.prefix_weight(step)) for step in (0, first.end - 1, second.first)] == [0.25] * 3
    middle = (second.first + second.end) // 2
    done = (middle - second.first) / (second.end - second.first)
    assert plan.prefix_weight(middle) == pytest.approx(0.25 * (1 - done), rel=1e-6)
    assert plan.prefix_weight(middle).dtype == np.float32
    assert plan.prefix_weight(third.first) == plan.prefix_weight(plan.steps - 1) == 0
    assert plan.inputs(middle).prefix_weight == plan.prefix_weight(middle)
    assert all(Plan(preset("multi-token")).prefix_weight(step) is None for step in (0, middle))


def prefixed(folder, **changes):
    """The demo, with a weight of prefixes throughout."""
    return changed(
        demo(), {"stages": (Stage(part=1, prefix=(0.5, 0.25)),), "data.bpe_dir": folder, "devices": 1, **changes}
    )


@pytest.mark.parametrize(
    ("stage", "fragments"),
    [
        (Stage(part=1, prefix=(0.0, 0.1)), ["--stages.0.prefix needs --data.bpe-dir", "encoder.json and vocab.bpe"]),
        (Stage(part=1, prefix=(-0.1, 0.1)), ["--stages.0.prefix holds -0.1; use weights of 0 or more"]),
        (Stage(part=1, prefix=(float("nan"), 0.1)), ["--stages.0.prefix holds nan"]),
    ],
    ids=str,
)
def test_a_weight_that_cannot_work_is_refused(stage, fragments):
    with pytest.raises(UserError) as caught:
        check_config(prefixed(None, stages=(stage,)))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_tables_that_cannot_serve_are_refused(tmp_path):
    """In one line that names the flag; a vocabulary smaller than theirs too."""
    missing = tmp_path / "none"
    with pytest.raises(UserError, match=r"cannot read .*none/encoder.json .*: --data.bpe-dir takes a folder") as caught:
        wire(prefixed(str(missing)))
    assert "\n" not in str(caught.value)
    folder = write_tables(tmp_path / "bpe")
    with pytest.raises(UserError, match=r"--data.bpe-dir .* tokens up to 260, --model.vocab-size is 200"):
        wire(prefixed(str(folder), **{"model.vocab_size": 200}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nl l\nh e\n")
    with pytest.raises(UserError, match=r"do not belong together: give --data\.bpe-dir matching ones"):
        wire(prefixed(str(folder)))


def test_a_run_without_its_tables_begins_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "prefixed", lambda: prefixed(str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"--data\.bpe-dir takes a folder"):
        train.main(["prefixed", f"--run-dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_run_records_the_weighted_loss_and_goes_on_as_if_it_had_not_stopped(monkeypatch, tmp_path):
    """At first all logits are equal: ln 50304 for each prediction. Evaluations are of the next token alone."""
    folder = write_tables(tmp_path / "bpe")
    stages = (Stage(part=1, prefix=(0.5, 0.0)),)
    few = {
        "model.dim": 16,
        "model.layers": LayerSchedule(prelude=1, loop=0, visits=0, coda=1),
        "data.val_tokens": 512,
        "data.val_seq_len": 512,
        "steps": 3,
        "batch_tokens": 1024,
        "seq_len": 512,
        "val_every": 3,
        "checkpoint_every": 1,
        "checkpoint_keep": 9,
        "compilation_cache": None,
    }
    config = prefixed(str(folder), stages=stages, **few)
    monkeypatch.setitem(PRESETS, "prefixed", lambda: config)
    finished = train.main(["prefixed", f"--run-dir={tmp_path / 'run'}"])

    read = np.fromfile(config.data.train_files, np.uint16, 1025, offset=1024)
    table = read_prefixes(str(folder), VOCAB_SIZE)
    share = (table[read[1:]] >= 0).mean()
    assert share > 0
    first = next(record for record in records(finished) if record["step"] == 1)
    assert first["loss"] == pytest.approx((1 + share / 2) * math.log(50304), rel=1e-6)
    evaluated = next(record for record in records(finished) if "val_loss" in record)
    assert evaluated["val_loss"] == pytest.approx(math.log(50304), rel=1e-6)

    copy = shutil.copytree(finished, tmp_path / "copy")
    train.main(["--run-dir", str(copy), "--resume=1"])
    assert records(copy) == records(finished)
    assert_same_bits(state_of(copy, 3), state_of(finished, 3))
