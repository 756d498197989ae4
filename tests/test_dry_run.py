"""Before a run and after it: what it would be, repeating one from its file, and what is said at its end."""

import dataclasses
import json
import shlex

import pytest

from senano_jax import train
from senano_jax.config import changed
from senano_jax.config_file import to_text
from senano_jax.errors import UserError
from senano_jax.files import write_atomically
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.runlog.next_steps import draw_curve, next_steps
from senano_jax.training.dry_run import describe, earlier_speeds, seconds_at_usual_mfu

TINY = changed(preset("demo"), {"model.dim": 16, "model.num_heads": 2, "steps": 4, "devices": 2})


def lines_of(capsys) -> dict[str, str]:
    """What was printed, by the labels of the lines."""
    return {line[:17].strip(): line[17:].strip() for line in capsys.readouterr().out.splitlines()}


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps=4", "--devices=2", "--model.dim=16", "--model.num-heads=2", "--run-dir=run"]
    assert train.main(["demo", "--dry-run", *flags]) is None
    assert not list(tmp_path.iterdir())
    said = lines_of(capsys)
    count, rest = said["parameters"].split(": ")
    count = int(count.replace(",", ""))
    assert rest == f"{162_000_000 - count:,} below the track's 162,000,000, read strictly"
    assert said["tokens"].startswith("16,384 trained on")
    assert said["steps"] == "4, evaluations every 16 and at the end, of 32,768 tokens"
    assert said["each step"] == "4,096 tokens, 4 x 1,024; window 1 to 3 x 128"
    assert said["training shards"].startswith("1 files ")
    assert said["training shards"].endswith("; 16,385 tokens needed: enough")
    assert said["devices"] == "2 x cpu: 1 micro-batches of 2 x 1,024 tokens on each"
    assert "of activations (estimated)" in said["memory"]
    assert said["time"].startswith("not known here")


def test_averages_that_devices_share_take_less_of_each(monkeypatch, capsys):
    monkeypatch.setattr("senano_jax.training.dry_run._gib", str)  # bytes: the model is small
    said = []
    for shared in (False, True):
        describe(changed(TINY, {"share_matrices": shared}), "demo")
        said.append(int(lines_of(capsys)["memory"].split("a device: ")[1].split()[0]))
    assert said[1] < said[0]


def test_stages_are_said_one_by_one(capsys):
    config = changed(TINY, {"stages": preset("multi-token").stages, "steps": 6})
    describe(config, "demo")
    said = lines_of(capsys)
    assert said["stage 1"] == "steps 2 to 4: 4,096 tokens, 4 x 1,024; window 2 x 128"
    assert {"stage 0", "stage 1", "stage 2"} < said.keys()


def test_everything_that_keeps_a_run_from_starting_is_named_at_once(tmp_path, capsys):
    """Shards that are missing or too few, the folder of another run, more devices than there are."""
    (tmp_path / "config.json").write_text("{}")
    config = changed(TINY, {"steps": 1000, "data.val_files": "none*.bin", "run_dir": str(tmp_path), "devices": 99})
    with pytest.raises(UserError, match="this run cannot start \\(4 faults, named above\\)"):
        describe(config, "demo")
    out = capsys.readouterr().out
    assert "are missing" in out and "none to be read at none*.bin; 32,769 tokens needed" in out
    faults = [line[17:] for line in out.splitlines() if line.startswith("fault ")]
    for fault, text in zip(faults, ("the run needs 4,096,001", "none*.bin", "holds a run already", "--devices 99")):
        assert text in fault


def fault_of(config, capsys) -> str:
    """The only one that is named; the run would start but for it."""
    with pytest.raises(UserError, match=r"this run cannot start \(1 fault, named above\)"):
        describe(config, "demo")
    return lines_of(capsys)["fault"]


def test_too_few_validation_tokens_are_told_by_their_own_flag(capsys):
    fault = fault_of(changed(TINY, {"data.val_tokens": 8_388_608}), capsys)
    assert "--data.val-tokens 8388608 and the last target take 8,388,609" in fault


def test_weights_that_are_not_there_are_a_fault(capsys):
    fault = fault_of(dataclasses.replace(TINY, init_from="nothing.pt"), capsys)
    assert fault == "--init-from nothing.pt: there is no such file; check the name"


def test_a_run_without_a_finished_checkpoint_is_a_fault(tmp_path, capsys):
    """As the source of weights, and to go on with at a step; to go on with at the newest, it begins again."""
    folder = tmp_path / "run"
    going_on = dataclasses.replace(TINY, run_dir=str(folder), resume="latest")
    written_run(folder, TINY, {0: 0})
    describe(going_on, "demo")
    assert "fault" not in lines_of(capsys)
    config = dataclasses.replace(TINY, init_from=str(folder))
    assert fault_of(config, capsys).startswith(f"{folder} holds no checkpoints")
    (folder / "checkpoints").mkdir()
    assert fault_of(config, capsys).startswith(f"{folder / 'checkpoints'} holds no finished checkpoint")
    assert "holds no finished checkpoint" in fault_of(dataclasses.replace(going_on, resume=3), capsys)
    assert not list((folder / "checkpoints").iterdir())


def test_a_folder_that_cannot_be_made_is_a_fault(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    fault = fault_of(dataclasses.replace(TINY, run_dir=str(file / "run")), capsys)
    assert fault == f"--run-dir {file / 'run'} cannot be made or written: {file} is no folder; choose another"
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    fault = fault_of(dataclasses.replace(TINY, run_dir=str(tmp_path / "new" / "run")), capsys)
    assert f": {tmp_path} may not be written;" in fault


def test_several_processes_without_a_folder_in_common_are_a_fault(monkeypatch, capsys):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("senano_jax.training.dry_run.wire", lambda config: None)  # which asks the other process
    assert "needs --run-dir, the same folder for all of them" in fault_of(TINY, capsys)


def test_what_cannot_work_at_all_is_refused_as_by_a_run():
    with pytest.raises(UserError, match="--steps is 0"):
        describe(dataclasses.replace(TINY, steps=0), "demo")


# Speed


def written_run(folder, config, times, device="cpu"):
    """A run of four steps; `times` are those of its evaluations in milliseconds, by step."""
    folder.mkdir(parents=True)
    write_atomically(folder / "config.json", to_text(config, "demo", parameters=1).encode())
    (folder / "environment.json").write_text(json.dumps({"devices": [{"kind": device}] * 2}))
    lines = [
        {"step": n, "tokens_trained": 4096 * n, "val_loss": 9.0, "window": 1, "train_time_ms": ms}
        for n, ms in times.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_speed_is_that_of_a_run_of_the_same_model_on_the_same_devices(tmp_path):
    """Without its first part, which has the compilation in it; seed and length may differ."""
    written_run(tmp_path / "same", dataclasses.replace(TINY, seed=5), {0: 0, 2: 9000, 4: 9500})
    written_run(tmp_path / "wider", changed(TINY, {"model.dim": 32}), {0: 0, 4: 10})
    written_run(tmp_path / "alone", dataclasses.replace(TINY, devices=1), {0: 0, 4: 10})
    written_run(tmp_path / "elsewhere", TINY, {0: 0, 4: 10}, device="NVIDIA H100")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    [speed] = earlier_speeds(dataclasses.replace(TINY, steps=32), "2 x cpu", tmp_path)
    assert speed.tokens_per_s == pytest.approx(2 * 4096 / 0.5)
    assert speed.source == f"{tmp_path / 'same'} (16,384 tokens)"
    assert not list(earlier_speeds(TINY, "8 x cpu", tmp_path))


def test_the_time_by_arithmetic_is_near_that_of_the_run_in_full_length():
    """667 s on four H100s (README.md), compilation included; none is made up for other devices."""
    plan = Plan(preset("recurrent"))
    seconds = seconds_at_usual_mfu(plan, "NVIDIA H100 80GB HBM3", 4)
    assert 0.8 * 667 < seconds < 1.25 * 667
    assert seconds_at_usual_mfu(plan, "NVIDIA H100 80GB HBM3", 8) == pytest.approx(seconds / 2)
    assert seconds_at_usual_mfu(plan, "cpu", 1) is None


# A run from a file


def request(*arguments):
    return train.parse_request(list(arguments))


def test_a_run_is_repeated_from_its_folder_or_file_with_changes(tmp_path):
    """Not into the folder that it was in, and not as its continuation."""
    there = dataclasses.replace(TINY, run_dir=str(tmp_path), resume="latest", seed=3)
    file = tmp_path / "config.json"
    file.write_text(to_text(there, "demo", parameters=1))
    expected = dataclasses.replace(TINY, seed=3)
    for source in (tmp_path, file):
        repeated = request("--config", str(source))
        assert (repeated.config, repeated.preset) == (expected, "demo")
    other = request(f"--config={file}", "--seed=4", "--run-dir=elsewhere").config
    assert other == dataclasses.replace(TINY, seed=4, run_dir="elsewhere")


def test_a_configuration_may_be_toml(tmp_path):
    """And of nobody's preset: then the run is called like its file."""
    document = json.loads(to_text(TINY, "demo"))
    del document["preset"]
    file = tmp_path / "mine.toml"
    file.write_text("".join(toml_lines(document)))
    assert request("--config", str(file))[:2] == (TINY, "mine")


def toml_lines(table: dict, prefix: str = ""):
    """Fields that are None are left out: they are None by default."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from toml_lines(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key} = {json.dumps(value)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--config", "x.json"], "demo and --config x.json exclude each other"),
        (["--config=x.json", "--resume", "--run-dir=r"], "--resume goes on with the configuration of --run-dir r"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["--config", "broken.toml"], "broken.toml: not TOML"),
        (
            ["--config", "short.toml"],
            "short.toml: field batch_tokens is missing; mend it; python -m senano_jax presets",
        ),
        (["--config", "wrong.toml"], "wrong.toml: steps is 'many'; mend it; python -m senano_jax presets NAME"),
        (["--config", "kind.toml"], "model.kind is 'Mamba', not one of ModelConfig, Gpt2Config; mend it;"),
        (["--config", "nowhere.toml"], "nowhere.toml cannot be read (No such file or directory); check the name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("steps = = 3")
    (tmp_path / "short.toml").write_text("steps = 3")
    whole = json.loads(to_text(TINY, "demo"))
    (tmp_path / "wrong.toml").write_text("".join(toml_lines(whole | {"steps": "many"})))
    (tmp_path / "kind.toml").write_text("".join(toml_lines(whole | {"model": {"kind": "Mamba"}})))
    with pytest.raises(UserError) as caught:
        request(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# After a run


def test_the_end_of_a_run_names_commands_that_a_shell_understands(tmp_path):
    folder = tmp_path / "my run's"
    lines = next_steps(folder, folder / "curve.html", 4).splitlines()
    assert lines[:2] == [f"run folder: {folder}", f"curve:      {folder / 'curve.html'}"]
    commands = [shlex.split(line.partition(":")[2]) for line in lines[2:]]
    modules = [command[2].removeprefix("senano_jax.") for command in commands]
    assert modules == ["evaluate", "sample", "compare", "train"]
    assert all(str(folder) in command for command in commands)
    assert commands[-1][-2:] == ["--seed", "5"], "not the same run again"
    assert "curve" not in next_steps(folder, None, 0)


def test_a_curve_that_cannot_be_drawn_is_a_line(tmp_path):
    curve, reason = draw_curve(tmp_path / "nothing")
    assert curve is None and reason.startswith("no curve was drawn (") and "\n" not in reason
