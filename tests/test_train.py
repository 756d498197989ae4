"""The commands from end to end, on the bundled sample and a model of a few thousand parameters a layer."""

import dataclasses
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import kept_programs
import pytest
from tiny import tiny_gpt2

from senano_jax import evaluate, train
from senano_jax import sample as sample_command
from senano_jax.config_file import read_config
from senano_jax.data import sample
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.jax_settings import configure_jax
from senano_jax.model.build import abstract_params, make_model
from senano_jax.plan import window_blocks
from senano_jax.runlog.data_record import read_data
from senano_jax.runlog.reader import read_log
from senano_jax.training.checkpoint import Checkpoints, load_params
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import make_mesh
from senano_jax.training.weights import is_weights_file, load_weights

one_trace = kept_programs.one_trace  # for all tests here

EXPORT = Path(__file__).parents[1] / "scripts" / "export_torch.py"

STEPS, BATCH, SEQ = 5, 512, 256
SMALL = [
    "--model.dim=16", "--model.num-heads=2", f"--steps={STEPS}", f"--batch-tokens={BATCH}", f"--seq-len={SEQ}",
    "--final-window-tokens=256", "--data.val-tokens=512", "--data.val-seq-len=256", "--val-every=2", "--devices=2",
]  # fmt: skip
# Where the loop does not matter: quicker to compile.
PLAIN = ["demo", *SMALL, "--model.layers.loop=0", "--model.layers.visits=0"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run that saved every step and kept steps 2 and 4 beside the newest."""
    path = tmp_path_factory.mktemp("runs") / "run"
    kept = ["--checkpoint-every=1", "--checkpoint-keep=1", "--checkpoint-keep-every=2"]
    return train.main(["demo", *SMALL, *kept, f"--run-dir={path}"])


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r], [r for r in lines if "val_loss" in r]


def test_every_step_and_evaluation_is_recorded_with_its_place_in_the_stream(run_dir):
    steps, evaluations = records(run_dir)
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["tokens_trained"] for r in steps] == [BATCH * k for k in range(1, STEPS + 1)]
    assert all(r["tokens_read"] == r["tokens_trained"] for r in steps)
    assert [(r["step"], r["tokens_trained"]) for r in evaluations] == [(s, s * BATCH) for s in (0, 2, 4, STEPS)]
    assert evaluations[0]["val_loss"] == pytest.approx(10.8258, abs=1e-4)  # ln 50304: the head is zero
    assert evaluations[-1]["val_loss"] < 10.0


def test_the_log_is_in_pytorch_s_format_and_the_comparison_tool_reads_the_folder(run_dir):
    log = (run_dir / "log.txt").read_text()
    pattern = rf"^step:4/{STEPS} val_loss:\d+\.\d{{4}} train_time:\d+ms step_avg:\d+\.\d{{2}}ms tokens:0\.00M$"
    assert re.search(pattern, log, re.MULTILINE)
    parsed = read_log(str(run_dir))
    assert parsed.complete and parsed.tokens_trained == STEPS * BATCH
    assert parsed.parameters == json.loads((run_dir / "config.json").read_text())["parameters"]


def test_the_folder_says_what_was_run_and_where(run_dir):
    config, preset = read_config(run_dir / "config.json")
    assert preset == "demo"
    assert (config.steps, config.model.dim, config.devices) == (STEPS, 16, 2)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"][0]["platform"] == "cpu"


def test_the_folder_says_which_shards_were_read(run_dir):
    shards = read_data(run_dir)
    for part, path in (("train", Path(sample.TRAIN)), ("val", Path(sample.VAL))):
        (shard,) = shards[part]
        assert (shard.name, shard.bytes, shard.tokens) == (path.name, path.stat().st_size, len(open_shard(path)))
        assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_evaluate_gives_the_final_validation_loss_again(run_dir, capsys):
    final = records(run_dir)[1][-1]["val_loss"]
    loss = evaluate.main([str(run_dir)])
    assert loss == pytest.approx(final, rel=1e-6)
    assert capsys.readouterr().out.strip() == f"val_loss:{loss:.6f} tokens:512"


def test_an_earlier_checkpoint_is_evaluated_at_the_window_of_its_step(run_dir):
    logged = {record["step"]: record for record in records(run_dir)[1]}
    assert logged[2]["window"] == 1 != logged[STEPS]["window"]
    assert evaluate.main([str(run_dir), "--step=2"]) == pytest.approx(logged[2]["val_loss"], rel=1e-6)
    with pytest.raises(UserError, match="no checkpoint of this step; it holds: 2, 4, 5"):
        evaluate.main([str(run_dir), "--step=3"])


def test_weights_can_be_evaluated_in_another_type_than_they_were_trained_in(run_dir):
    exact, rounded = evaluate.main([str(run_dir)]), evaluate.main([str(run_dir), "--dtype=bfloat16"])
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_a_smaller_window_changes_the_evaluation(run_dir):
    assert evaluate.main([str(run_dir), "--window-blocks=1"]) != evaluate.main([str(run_dir), "--window-blocks=2"])


def test_a_run_can_start_from_another_run_s_weights(run_dir, tmp_path):
    again = train.main(
        ["demo", *SMALL, f"--init-from={run_dir}", "--final-window-tokens=128", f"--run-dir={tmp_path / 'b'}"]
    )
    first_loss = records(again)[1][0]["val_loss"]
    assert first_loss == pytest.approx(evaluate.main([str(run_dir), "--window-blocks=1"]), rel=1e-6)


def test_llmc_trains_goes_on_and_is_evaluated(tmp_path):
    """Another model and another optimiser through the same commands; its rate is logged, and no momentum. A run that is
    resumed gives the same losses, bit for bit, and its weights the loss that it ended with."""
    flags = ["--initial-window-tokens=256", "--model.num-layers=1", "--model.max-length=512", "--dtype=float32"]
    files = [f"--data.train-files={sample.TRAIN}", f"--data.val-files={sample.VAL}"]
    arguments = [*SMALL, *flags, *files, "--val-every=0", "--checkpoint-every=3", f"--run-dir={tmp_path / 'run'}"]
    whole, (evaluation,) = records(train.main(["llmc", *arguments]))
    assert [(r["lr"], r["window"]) for r in whole] == [(pytest.approx(k / 700), 2) for k in range(1, STEPS + 1)]
    assert all("momentum" not in r for r in whole)
    resumed, _ = records(train.main(["llmc", *arguments, "--resume=3"]))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]
    assert evaluate.main([str(tmp_path / "run")]) == pytest.approx(evaluation["val_loss"], rel=1e-6)


def test_weights_of_another_model_are_refused(run_dir):
    """In one line, before they are read."""
    with pytest.raises(UserError, match="holds a run of another model; give that of the same preset"):
        load_params(run_dir, abstract_params(tiny_gpt2()), make_mesh(1))


def test_the_newest_checkpoints_are_kept(run_dir):
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [STEPS, 4, 2]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_checkpoint(tmp_path):
    arguments = [*PLAIN, "--checkpoint-every=1", "--optimizer.embeddings.rate=1e38", f"--run-dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"step \d+ has loss .*nan.*; the newest checkpoint is that of step \d+;"):
        train.main(arguments)
    steps, _ = records(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) for record in steps[:-1])
    assert read_log(tmp_path / "run").diverged == f"step {steps[-1]['step']}"


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path):
    arguments = [*PLAIN, "--val-every=0", f"--run-dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="/nowhere is neither weights"):
        train.main([*arguments, "--init-from=/nowhere"])
    assert len(records(train.main(arguments))[0]) == STEPS


@pytest.mark.parametrize("there", [(), ("kept",), ("kept", "kept/run")])
def test_a_run_that_could_not_begin_leaves_nothing(tmp_path, there):
    """Neither its own folder nor those above it, but for what was there."""
    for folder in there:
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="/nowhere is neither weights"):
        train.main([*PLAIN, f"--run-dir={tmp_path / 'kept' / 'run'}", "--init-from=/nowhere"])
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == list(there)


def test_a_complete_run_is_left_as_it_is(run_dir, capsys):
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert train.main(["--run_dir", str(run_dir), "--resume"]) == run_dir  # underscores are dashes
    assert f"is complete: {STEPS} steps" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before


def test_a_folder_with_a_run_in_it_is_refused(run_dir):
    with pytest.raises(UserError, match="holds a run already"):
        train.main(["demo", *SMALL, f"--run-dir={run_dir}"])


def test_more_tokens_than_the_shards_hold_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="samples are never repeated"):
        train.main(["demo", *SMALL, "--steps=100000", f"--run-dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_replaying_the_pytorch_loader_skips_tokens_and_says_so(tmp_path):
    path = train.main([*PLAIN, "--data.discard-micro-batch=512", "--val-every=0", f"--run-dir={tmp_path / 'run'}"])
    steps, _ = records(path)
    assert [r["tokens_read"] for r in steps] == [(BATCH + 512) * k for k in range(1, STEPS + 1)]
    assert [r["tokens_trained"] for r in steps] == [BATCH * k for k in range(1, STEPS + 1)]


def test_an_exported_checkpoint_evaluates_to_the_loss_of_the_run(run_dir, tmp_path):
    """Also with another implementation of attention, and as the start of another run."""
    pytest.importorskip("torch")
    runpy.run_path(str(EXPORT))["export"](run_dir, tmp_path / "state.pt")
    config, _ = read_config(run_dir / "config.json")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="dense"))
    mesh, model = make_mesh(1), make_model(config.model, config.dtype)
    params, _ = load_weights(str(tmp_path / "state.pt"), config.model, abstract_params(model), mesh)
    window = window_blocks(STEPS, STEPS, config.final_window_tokens)
    final = records(run_dir)[1][-1]["val_loss"]
    assert make_evaluator(config, model, mesh)(params, window) == pytest.approx(final, rel=1e-6)
    # The architecture comes from the preset, so a checkpoint of another width is refused by tensor and shape.
    with pytest.raises(UserError, match=r"embed\.weight has shape \(50257, 16\), this model needs \(50257, 64\)"):
        evaluate.main([str(tmp_path / "state.pt"), "--preset=demo"])
    started = train.main(
        ["demo", *SMALL, "--final-window-tokens=128",
         f"--init-from={tmp_path / 'state.pt'}", f"--run-dir={tmp_path / 'run'}"]
    )  # fmt: skip
    expected = evaluate.main([str(run_dir), "--window-blocks=1"])
    assert records(started)[1][0]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_weights_are_known_by_what_lies_there(run_dir, tmp_path, monkeypatch):
    """Not by the end of their name. What cannot be weights is refused for what it is, before shards are looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(run_dir)
    assert not is_weights_file("~/run")
    for name in ("weights.pth", "weights.bin", "weights"):
        (tmp_path / name).touch()
        assert is_weights_file(f"~/{name}")
    wrong = {
        tmp_path / "typo": "cannot be read (nothing is called ",
        tmp_path: "config.json cannot be read (there is no such file); give the folder of a run",
        run_dir / "checkpoints" / "4": f"but a checkpoint in one; give {run_dir} (with --step 4)",
        run_dir / "metrics.jsonl": f"but a file in one; give {run_dir}",
    }
    for path, reason in wrong.items():
        for command in (
            evaluate.main,
            sample_command.main,
            lambda words: train.main([*PLAIN, f"--init-from={words[0]}"]),
        ):
            with pytest.raises(UserError) as caught:
                command([str(path)])
            start = f"{path} is neither weights (.safetensors, .pt) nor the folder of a run"
            assert str(caught.value).startswith(start) and reason in str(caught.value)


def test_paths_may_begin_at_home_and_have_brackets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards [1]").mkdir()
    shutil.copy(sample.TRAIN, tmp_path / "shards [1]" / "a[b].bin")
    flags = ["--data.train-files=~/shards [1]/a[b].bin", "--val-every=0", "--run-dir=~/runs/[one] {x}%20#?"]
    run = train.main([*PLAIN, *flags, "--compilation-cache=~/xla"])
    assert run == tmp_path / "runs" / "[one] {x}%20#?" and not (tmp_path / "~").exists()
    again = train.main(["--run-dir=~/runs/[one] {x}%20#?", "--resume"])
    assert again == run
    loss = evaluate.main(["~/runs/[one] {x}%20#?", "--data.val-files", sample.VAL])
    assert loss == pytest.approx(records(run)[1][-1]["val_loss"], rel=1e-6)


BAD_INPUT = [
    (["nonsense"], "unknown preset 'nonsense'; choose one of"),
    (["--steps", "4", "demo"], "the preset comes first: python -m senano_jax.train demo --steps 4"),
    (["--tensorboard", "demo"], "the preset comes first: python -m senano_jax.train demo --tensorboard"),
    ([".", "--resume"], ". is a path, not a preset; say with a flag what it is"),
    (["--resume"], "--resume needs --run-dir"),
    (["demo", "--batch-tokens=5000"], "--batch-tokens 5000 is not a multiple of --seq-len 1024"),
    (["demo", "--data.train-files=/nowhere/*.bin"], "no shard matches '/nowhere/*.bin'"),
    (["demo", "--model.attention=flash", "--model.dim=24"], "heads whose width is a power of two from 16 up"),
]
# `python -m senano_jax.train` with the words of every line that comes, in a process of its own that has JAX already.
COMMAND_BY_LINE = """
import json, os, runpy, sys
import senano_jax.train
del sys.modules["senano_jax.train"]
for line in sys.stdin:
    words = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.close(write)
        sys.argv = ["senano_jax.train", *words]
        runpy.run_module("senano_jax.train", run_name="__main__", alter_sys=True)
        sys.exit(0)
    os.close(write)
    said = os.fdopen(read).read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def train_command(tmp_path_factory):
    """(words) -> status and standard error of the command; its folder is empty."""
    folder = tmp_path_factory.mktemp("empty")
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND_BY_LINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as process:

        def run(words):
            print(json.dumps(words), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_ends_in_one_line_without_a_traceback(arguments, message, train_command):
    status, said = train_command([*arguments, "--compilation-cache=None"])
    assert status == 2
    assert said.count("\n") == 1 and said.startswith("error: ") and message in said


def test_a_cache_of_compiled_programs_named_in_the_environment_is_kept(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    configure_jax("bfloat16", "~/elsewhere")
    assert jax.config.jax_compilation_cache_dir == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        configure_jax("bfloat16", "~/elsewhere")
        assert jax.config.jax_compilation_cache_dir == os.path.expanduser("~/elsewhere")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_bad_token_in_the_middle_of_training_is_named(tmp_path):
    tokens = open_shard(sample.TRAIN)[: STEPS * BATCH + 1].copy()
    write_shard(tmp_path / "train.bin", tokens)
    with (tmp_path / "train.bin").open("r+b") as file:
        file.seek(1024 + 2 * 2000)
        file.write((60000).to_bytes(2, "little"))
    with pytest.raises(UserError, match=r"train\.bin holds 60000 at token 2000"):
        train.main([*PLAIN, f"--data.train-files={tmp_path}/*.bin", f"--run-dir={tmp_path / 'run'}"])
