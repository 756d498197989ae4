"""The command that writes text: what it prints, what it refuses."""

import itertools
import json
import shutil

import pytest
from tiny import small_run

from senano_jax import sample
from senano_jax.config_file import read_config
from senano_jax.data.bpe import load_bpe
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.interop.torch_checkpoint import to_torch, write_torch_checkpoint
from senano_jax.model.build import abstract_params, make_model
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import make_mesh


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory):
    """Tables as large as GPT-2's, so that every token has a text: the bytes, then 50,000 pairs of their characters."""
    folder = tmp_path_factory.mktemp("bpe")
    visible = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    symbols = visible + [chr(c) for c in range(256, 512 - len(visible))]
    pairs = list(itertools.islice(itertools.product(symbols, symbols), 50_000))
    numbers = {token: number for number, token in enumerate([*symbols, *map("".join, pairs)])}
    (folder / "encoder.json").write_text(json.dumps(numbers | {"<|endoftext|>": END_OF_TEXT}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs)]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "run", steps=(2, 4))


@pytest.fixture
def write(run_dir, bpe_dir):
    def run(*flags, source=run_dir):
        return sample.main([str(source), f"--bpe_dir={bpe_dir}", "--tokens=6", "--prompt=zum", *flags])

    return run


def test_texts_are_printed_after_their_prompt_and_depend_on_the_seed(write, capsys):
    """The first of several is the one that is written alone."""
    [alone], [again], [other] = write(), write(), write("--seed=1")
    assert alone == again != other
    printed = capsys.readouterr().out
    assert printed == "".join(f"zum{text}\n" for text in (alone, again, other))
    both = write("--num-samples=2")
    assert both[0] == alone != both[1]
    assert capsys.readouterr().out == f"--- 1 of 2\nzum{both[0]}\n--- 2 of 2\nzum{both[1]}\n"


def test_the_checkpoint_of_a_step_is_taken(write):
    newest, of_last_step, of_another = write(), write("--step=4"), write("--step=2")
    assert newest == of_last_step != of_another


def test_pytorch_weights_write_the_same_text(write, run_dir, tmp_path, monkeypatch):
    """Under the preset they belong to."""
    pytest.importorskip("torch")
    config, _ = read_config(run_dir / "config.json")
    params, step = load_params(run_dir, abstract_params(make_model(config.model, config.dtype)), make_mesh(1))
    write_torch_checkpoint(tmp_path / "weights.pt", to_torch(params, config.model), step)
    monkeypatch.setattr(sample, "preset", {"demo": config}.__getitem__)
    assert write("--preset=demo", source=tmp_path / "weights.pt") == write()


def test_text_ends_where_the_document_ends_and_characters_come_whole(bpe_dir):
    """é is two bytes, so two tokens; a half one at the end is marked as such."""
    encoding = load_bpe(bpe_dir)
    a, first, second = (encoding.encode_single_token(byte) for byte in (b"a", b"\xc3", b"\xa9"))
    assert list(sample.decode([a, first, second, END_OF_TEXT, a], encoding)) == ["a", "", "é", ""]
    assert "".join(sample.decode([a, first], encoding)) == "a�"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens=0"], "--tokens is 0; it must be at least 1"),
        (["--tokens=1022"], r"--tokens 1022 after a prompt of \d tokens is more than the 1024 of a training sequence"),
        (["--temperature=-1"], r"--temperature is -1\.0; use 0 or more"),
        (["--temperature=nan"], "--temperature is nan; use 0 or more"),
        (["--top-k=0"], "--top-k is 0; it must be at least 1"),
        (["--top-k=50258"], "--top-k 50258 is more than the 50257 tokens there are"),
        (["--num-samples=0"], "--num-samples is 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--step=3"], "--step 3: .* holds no checkpoint of this step; it holds: 2, 4"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, message, write):
    with pytest.raises(UserError, match=message) as caught:
        write(*flags)
    assert "\n" not in str(caught.value)


def test_sources_that_hold_no_weights_are_named(write, run_dir, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json cannot be read .*; give the folder of a run"):
        write(source=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.pt is not a file"):
        write(source=tmp_path / "gone.pt")
    with pytest.raises(UserError, match=r"--step 2 chooses a checkpoint of a run, but .*gone\.pt holds one state"):
        write("--step=2", source=tmp_path / "gone.pt")
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoints"):
        write(source=run)
