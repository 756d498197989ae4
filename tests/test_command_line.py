"""What a researcher meets first: help without waiting, one line on what is wrong, and nothing of JAX before that."""

import re
import subprocess
import sys

import pytest

from senano_jax import evaluate, profile, sample, train
from senano_jax import rules as rules_command
from senano_jax.__main__ import COMMANDS, main, overview
from senano_jax.command_line import parse, with_dashes
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.presets import PRESETS, preset

# Each command with arguments that end it before it has anything to compute.
EARLY_ENDS = """
import contextlib, io, runpy, sys

heavy = {"jax", "flax", "optax", "orbax", "grain", "matplotlib", "scipy.stats", "torch"}
for command in sys.argv[1:]:
    for arguments in (["--help"], ["--version"], ["--no-such-flag", "3"], ["trian-demo", "--no-such-flag"]):
        sys.argv = [command, *arguments]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                runpy.run_module("senano_jax." + command, run_name="__main__", alter_sys=True)
                status = None
            except SystemExit as end:
                status = end.code or 0
        expected = 0 if arguments[0] in ("--help", "--version") else 2
        print(command, arguments, status == expected or status, sorted(heavy & set(sys.modules)))
        if expected:
            assert said.getvalue().startswith("error: ") and said.getvalue().count("\\n") == 1, said.getvalue()
"""


def test_no_command_imports_jax_before_its_arguments_are_sound():
    """All of them in one process of its own; help, version and refusals end with the status that they should."""
    command = [sys.executable, "-c", EARLY_ENDS, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * len(COMMANDS)
    assert all(line.endswith("True []") for line in lines), done.stdout


def refusal(command, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        command(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps? python -m senano_jax.train [PRESET] --help"),
        (["--layers.visits=2"], "unknown flag --layers.visits; did you mean --model.layers.visits?"),
        (["--model.window-rows", "1"], "unknown flag --model.window-rows; python -m senano_jax.train [PRESET] --help"),
        (["--quite-another"], "unknown flag --quite-another; python -m senano_jax.train [PRESET] --help lists all"),
        (["--stages.0.rate=2"], "unknown flag --stages.0.rate"),  # a part that the preset does not have
        (["--steps", "three"], "--steps: 'three' is not a whole number; python -m senano_jax.train [PRESET] --help"),
        (["--optimizer.matrices.rate", "x"], "--optimizer.matrices.rate: 'x' is not a number"),
        (["--steps"], "--steps has no value"),
        (["--dtype", "f32"], "'f32'"),
        (["--steps", "3", "4"], "'4' belongs to no flag"),
        (["-x"], "unknown flag -x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_flag_is_one_line(arguments, message):
    assert message in refusal(train.parse_request, "demo", *arguments)


def test_flags_are_spelt_with_dashes_or_underscores_and_some_switch_off():
    request = train.parse_request(["recurrent", "--val_every=7", "--model.no-unroll", "--optimizer.matrices.rate", "1"])
    config = request.config
    assert (config.val_every, config.model.unroll, config.optimizer.matrices.rate) == (7, False, 1.0)
    assert train.parse_request(["multi-token", "--stages.1.rate=2"]).config.stages[1].rate == 2


@pytest.mark.parametrize(
    "switch", ["--model.head-gate", "--model.tied", "--model.no-unroll", "--model.cap.by-width", "--dry_run"]
)
def test_a_preset_behind_a_switch_is_told_its_place(switch):
    message = refusal(train.parse_request, "--steps=3", switch, "strict")
    assert message.startswith("strict stands after flags; the preset comes first: ")
    assert message.endswith(f"train strict --steps=3 {with_dashes([switch])[0]}")
    assert refusal(train.parse_request, "--data.val-files", "strict", "--x").startswith("unknown flag --x")


def test_a_value_like_a_flag_is_told_how_to_be_given():
    assert refusal(sample.main, "run", "--prompt", "--my_text").endswith(
        "; a value that begins with -- is given as --prompt=VALUE"
    )
    assert "VALUE" not in refusal(train.parse_request, "demo", "--dry-run", "--my-text")
    assert "VALUE" not in refusal(train.parse_request, "demo", "--steps=3", "--my-text")


def test_what_must_be_given_is_asked_for():
    for main_of in (evaluate.main, sample.main):
        assert refusal(main_of).startswith("RUN_DIR|FILE is missing: Folder of a run, a .safetensors file")
    message = refusal(lambda arguments: parse(rules_command.Arguments, arguments, "rules"))
    assert message.startswith("PATH is missing: Folder of the run; rules --help")


def help_of(command, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        command(["--help"])
    assert not end.value.code
    return capsys.readouterr().out


def test_help_has_headings_and_every_flag(capsys):
    """The flags of all parts of a run, each with its text, under the headings of GROUPS."""
    text = help_of(train.parse_request, capsys)
    headings = re.findall(r"^\W*([a-z.]+) options", text, re.MULTILINE)
    assert headings[: len(train.GROUPS)] == list(train.GROUPS)
    assert {"model", "model.layers", "data", "optimizer.matrices"} < set(headings)
    for flag in ("--steps", "--dry-run", "--config", "--wandb", "--model.layers.visits", "--optimizer.head.rate"):
        assert f" {flag} " in text or f" {flag}," in text
    assert "Optimiser steps; schedules are stretched over them," in text


def test_commands_have_only_the_flags_that_they_use(capsys):
    """A measurement keeps no checkpoints, and an evaluation reads no training shards."""
    text = help_of(profile.main, capsys)
    assert "--profile-steps" in text and "--batch-tokens" in text
    assert not re.search(r"--(run-dir|resume|checkpoint|wandb|val-every|dry-run)", text)
    assert refusal(profile.main, "demo", "--run-dir=x").startswith("unknown flag --run-dir")
    text = help_of(evaluate.main, capsys)
    assert "--data.val-files" in text and "--data.train-files" not in text
    assert refusal(evaluate.main, "run", "--data.train-files=x").startswith("unknown flag --data.train-files")


# All commands in one place


def test_the_overview_has_a_line_for_every_command_and_preset():
    lines = overview().splitlines()
    for name in (*COMMANDS, "presets", *PRESETS):
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["senano-jax", *arguments])
    main()


def test_a_preset_printed_is_a_configuration_to_begin_with(monkeypatch, capsys, tmp_path):
    run_main(monkeypatch, "presets", "multi-token")
    file = tmp_path / "mine.json"
    file.write_text(capsys.readouterr().out)
    assert read_config(file) == (preset("multi-token"), "multi-token")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # this process has imported the commands
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: trian is no command; did you mean train?"),
        (["presets", "demmo"], "error: unknown preset 'demmo'"),
        (["presets", "demo", "strict"], "error: presets takes one name, not 2"),
        (["train", "demo", "--stepz"], "error: unknown flag --stepz; did you mean --steps?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_there_is_not_is_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(message) and said.count("\n") == 1
