"""Presets of one's own: registered, or in a file that the command names."""

import re
import shlex

import pytest
from tiny_demo import tiny_demo

from senano_jax import profile, train
from senano_jax.config import changed
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.presets import PRESETS, preset, preset_names, register
from senano_jax.runlog.writer import RunFolder, new_run_dir
from senano_jax.train import take_preset

FILE = """
from senano_jax import changed, preset


def wide(dim=96):
    return changed(preset("demo"), {"model.dim": dim})


def _hidden():
    return wide()


def wrong():
    return {"dim": 96}


def failing():
    return changed(preset("demo"), {"model.dims": 96})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own presets.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def presets(monkeypatch):
    """The presets, as they will be again after the test."""
    monkeypatch.setattr("senano_jax.presets.PRESETS", dict(PRESETS))


def test_a_function_of_a_file_is_a_preset(file):
    assert preset(f"{file}:wide") == changed(preset("demo"), {"model.dim": 96})
    wide = changed(preset("demo"), {"model.dim": 96})
    assert take_preset([f"{file}:wide", "--steps=3"], "train") == (f"{file}:wide", wide, ["--steps=3"])


def test_a_command_runs_the_file_once(file, monkeypatch):
    """Which may take long, or print."""
    with file.open("a") as end:
        end.write(
            "import pathlib\nwith pathlib.Path(__file__).with_name('times').open('a') as log:\n    log.write('.')\n"
        )
    times = file.with_name("times")
    train.parse_request([f"{file}:wide", "--steps=3"])
    assert times.read_text() == "."
    monkeypatch.setattr("senano_jax.profile.check_config", raising(UserError("enough")))  # nothing is measured
    with pytest.raises(UserError, match="enough"):
        profile.main([f"{file}:wide", "--profile-steps=1"])
    assert times.read_text() == ".."


def raising(error):
    def check(config):
        raise error

    return check


@pytest.mark.parametrize("command", ["train", "profile"])
def test_a_file_s_preset_behind_flags_is_told_its_place(file, command):
    kind = {"train": train.Arguments, "profile": profile.Arguments}[command]
    place = f"the preset comes first: python -m senano_jax.{command} {shlex.join([f'{file}:wide', '--steps', '3'])}"
    with pytest.raises(UserError, match=re.escape(place)):
        take_preset(["--steps", "3", f"{file}:wide"], command, kind)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}", "names no function of the file; there are {file}:wide, {file}:wrong, {file}:failing"),
        ("{file}:", "names no function of the file; there are"),
        ("{file}:_hidden", "names no function of the file; there are"),
        ("{file}:changed", "names no function of the file; there are"),
        ("{file}:wrong", "the preset {file}:wrong returned dict, not a Config"),
        ("{file}:failing", "ModelConfig has no field 'dims'"),
        ("missing.py:wide", "missing.py is not there; give FILE.py:FUNCTION"),
        ("{folder}/broken.py:wide", "broken.py failed (SyntaxError"),
        ("{folder}/empty.py:wide", "there are none: write one that returns a Config"),
        ("demos", "unknown preset 'demos'; choose one of recurrent, "),
    ],
)
def test_what_cannot_be_a_preset_is_refused_in_one_line(file, name, message):
    (file.parent / "broken.py").write_text("def wide(:\n")
    (file.parent / "empty.py").write_text("x = 1\n")
    where = {"file": file, "folder": file.parent}
    with pytest.raises(UserError, match=re.escape(message.format(**where))) as caught:
        take_preset([name.format(**where)], "train") and preset(name.format(**where))
    assert "\n" not in str(caught.value)


def test_registered_presets(presets):
    register("tiny-demo", tiny_demo)
    assert preset("tiny-demo") == tiny_demo()
    assert preset_names()[-1] == "tiny-demo"
    register("tiny-demo", lambda: changed(tiny_demo(), {"seed": 1}))
    assert preset("tiny-demo").seed == 1, "a cell of a notebook may be run again"
    register("nothing", lambda: None)
    with pytest.raises(UserError, match="the preset nothing returned NoneType"):
        preset("nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo", "there is a preset 'demo' already"),
        ("--steps", "'--steps' cannot name a preset"),
        ("a/b", "cannot name a preset"),
        ("a.py", "cannot name a preset"),
        ("", "cannot name a preset"),
    ],
)
def test_names_that_cannot_be_registered(presets, name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        register(name, tiny_demo)


def test_the_run_s_folder_is_named_by_the_function(file):
    assert new_run_dir(f"{file}:wide").name.startswith("wide-")
    assert new_run_dir("demo").name.startswith("demo-")


@pytest.mark.parametrize(("typed", "kept"), [("{file}:wide", "own presets.py:wide"), ("a/demo", "a/demo")])
def test_a_run_keeps_no_path_of_its_preset(file, tmp_path, typed, kept):
    with RunFolder(tmp_path / "run") as folder:
        folder.start(tiny_demo(), typed.format(file=file), 1)
    assert read_config(tmp_path / "run" / "config.json") == (tiny_demo(), kept)


def test_a_run_s_folder_is_in_logs_whatever_a_file_calls_its_preset():
    folder = new_run_dir("a/../../b: c")
    assert folder.parent.name == "logs" and folder.name.startswith("a-..-..-b--c-")
