"""HellaSwag: the file, its rows, the score of an ending, and the command."""

import json

import jax
import numpy as np
import pytest
from oracles import gpt_logits
from test_tokenize_text import write_tables
from tiny import TINY, random_params, small_run, tiny_gpt2, tiny_model

from senano_jax import evaluate
from senano_jax.config import LayerSchedule
from senano_jax.data.bpe import load_bpe
from senano_jax.data.hellaswag import Row, read_questions, rows_of
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import to_torch
from senano_jax.training import choices
from senano_jax.training.choices import Share, log_probabilities, shares
from senano_jax.training.mesh import make_mesh

LINE = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "endings": ["is hello.", "sings a song.", "hello hello.", "sleeps."],
    "label": 2,
}


def write_file(path, *changes):
    path.write_text("".join(json.dumps(LINE | change) + "\n" for change in changes))
    return path


def test_the_published_form_is_read(tmp_path):
    """With labels as the file has them, or as text, as its copies do."""
    first, second = read_questions(write_file(tmp_path / "val.jsonl", {}, {"ctx": "hello", "label": "0"}))
    assert (first.line, first.context, first.label) == (1, LINE["ctx"], 2)
    assert (second.line, second.context, second.label) == (2, "hello", 0)
    assert first.endings == second.endings == tuple(LINE["endings"])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ctx": ""}, "line 2 has no text as ctx"),
        ({"endings": LINE["endings"][:3]}, "line 2 has no 4 texts as endings"),
        ({"endings": ["a", "b", "c", 4]}, "line 2 has no 4 texts as endings"),
        ({"label": ""}, "line 2 has no label from 0 to 3"),  # as in the test set
        ({"label": 4}, "line 2 has no label from 0 to 3"),
        ({"label": True}, "line 2 has no label from 0 to 3"),
    ],
    ids=str,
)
def test_a_line_of_another_form_is_named(change, fault, tmp_path):
    with pytest.raises(UserError, match=fault):
        read_questions(write_file(tmp_path / "val.jsonl", {}, change))


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 100_000, b"\xff\xfe", b"", b"\n\n"], ids=lambda c: str(c[:9]))
def test_a_file_of_another_kind_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "val.jsonl").write_bytes(content)
    for path in (tmp_path / "val.jsonl", tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"--hellaswag .*; give HellaSwag's hellaswag_val\.jsonl") as caught:
            read_questions(path)
        assert "\n" not in str(caught.value)


def test_a_row_is_a_document_of_context_and_ending(tmp_path):
    """Tokenised apart, so that no token holds a piece of both: " w" is one."""
    encoding = load_bpe(write_tables(tmp_path / "bpe"))
    changes = {"ctx": "hello", "endings": ["w", "hello w", "h", "hell"]}
    rows = rows_of(read_questions(write_file(tmp_path / "val.jsonl", {}, changes)), encoding, 99, 50257)
    assert len(rows) == 8
    assert rows[4].tokens == [END_OF_TEXT, encoding.encode_single_token("hello"), encoding.encode_single_token(" w")]
    assert [row.first for row in rows[4:]] == [2] * 4 and len({row.first for row in rows[:4]}) == 1
    for row, ending in zip(rows, [*LINE["endings"], *changes["endings"]]):
        assert row.tokens[0] == END_OF_TEXT and encoding.decode(row.tokens[row.first :]) == f" {ending}"


def test_what_the_model_cannot_read_is_named(tmp_path):
    encoding = load_bpe(write_tables(tmp_path / "bpe"))
    questions = read_questions(write_file(tmp_path / "val.jsonl", {"ctx": "hello"}, {"ctx": "h" * 90}))
    with pytest.raises(UserError, match=r"line 2 of --hellaswag has \d+ tokens, more than the 90 of a training seq"):
        rows_of(questions, encoding, 90, 50257)
    with pytest.raises(UserError, match="line 1 of --hellaswag has token 50256; the model's vocabulary has 50256"):
        rows_of(questions, encoding, 128, 50256)


def random_rows(count, longest, seed=0):
    """The first three: no padding, almost a block of it where there is room, one token after one."""
    rng = np.random.default_rng(seed)
    lengths = [128, min(129, longest), 2, *rng.integers(5, longest, count - 3)]
    return [Row(rng.integers(0, 500, n).tolist(), int(rng.integers(1, n)) if n > 2 else 1) for n in lengths]


def by_themselves(row, logits):
    """In float64, from the logits [T, V] of the row alone."""
    z = np.asarray(logits, np.float64)[:, : TINY.vocab_size]
    log_p = z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    return sum(log_p[n - 1, row.tokens[n]] for n in range(row.first, len(row.tokens)))


def test_scores_are_those_of_each_row_alone(monkeypatch):
    """By the model's formula in float64 without any padding, whatever stands beside it; windows do not reach all. Two
    rows of a block or one of two blocks at a time on each device, and rows that fill up the last group."""
    monkeypatch.setattr(choices, "TOKENS_AT_A_TIME_CPU", 256)
    model, rows, said = tiny_model(layers=LayerSchedule(1, 0, 0, 1)), random_rows(11, 250), []
    params = random_params(model)
    scores = log_probabilities(model, params, make_mesh(2), rows, 1, lambda *done: said.append(done))
    weights = to_torch(params, model.config)
    for row, score in zip(rows, scores):
        logits = gpt_logits(weights, np.array(row.tokens), 1, [0, 1], TINY.num_heads)
        assert score == pytest.approx(by_themselves(row, logits), rel=1e-5, abs=1e-4)
    assert said[-1] == (11, 11) and len(said) > 2
    assert scores.dtype == np.float64 and (scores < 0).all()


def test_gpt2_is_scored_over_its_vocabulary_alone():
    """Not over the rows that pad its table, here larger than all others. Weights that diverged are refused."""
    model, rows = tiny_gpt2(num_layers=1), random_rows(6, 128, seed=1)
    params = random_params(model)
    table = params["embedding"]
    larger = params | {"embedding": table.at[model.config.vocab_size :].multiply(100)}
    scores = log_probabilities(model, larger, make_mesh(1), rows, 2)
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens, 2, method="logits")[0, :, :500])
    for row, score in zip(rows, scores):
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(row.tokens)] = row.tokens
        assert score == pytest.approx(by_themselves(row, logits_of(tokens)), rel=1e-5, abs=1e-4)
    with pytest.raises(UserError, match="of 6 of 6 texts are not finite"):
        log_probabilities(model, params | {"embedding": table * np.float32("nan")}, make_mesh(1), rows, 2)


def test_shares_by_mean_and_by_sum():
    """The long true ending of the first question is the likelier by its tokens, the short wrong one as a whole."""
    scores = np.array([-4.0, -3.0, -9.0, -9.0, -1.0, -5.0, -5.0, -5.0])
    by_mean, by_sum = shares(scores, [4, 1, 1, 1, 2, 2, 2, 2], [0, 0])
    assert by_mean == Share(1.0, 2) and by_sum == Share(0.5, 2)
    assert by_mean.standard_error == 0 and by_sum.standard_error == pytest.approx(np.sqrt(0.125))


def test_the_command_prints_and_writes_the_shares(tmp_path, capsys):
    """No validation shard is looked for."""
    run, tables = small_run(tmp_path / "run", steps=(2,)), write_tables(tmp_path / "bpe")
    path = write_file(tmp_path / "val.jsonl", {}, {"label": 0}, {"label": 1}, {"label": 3}, {"ctx": "h"})
    flags = [f"--hellaswag={path}", f"--bpe-dir={tables}", "--data.val-files=nowhere", "--devices=1"]
    acc_norm = evaluate.main([str(run), *flags, f"--json={tmp_path / 'out.json'}"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["acc_norm"] == acc_norm in (0.2, 0.4) and result["questions"] == 5 and result["step"] == 2
    printed = "".join(f" {name}:{result[name]:.6g}" for name in list(result)[:5])
    assert capsys.readouterr().out == f"hellaswag{printed}\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hellaswag=nowhere.jsonl", "--hellaswag nowhere.jsonl cannot be read"),
        ("--json=nowhere/x", "--json nowhere/x"),
    ],
)
def test_the_command_refuses_before_it_computes(flag, message, tmp_path):
    run = small_run(tmp_path / "run", steps=(2,))
    with pytest.raises(UserError, match=message):
        evaluate.main([str(run), flag, "--devices=1"])
