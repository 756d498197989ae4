"""config.json: what is written is read back, and files of earlier versions still are."""

import json
from pathlib import Path

import pytest

from senano_jax.config import changed
from senano_jax.config_file import read_config, write_config
from senano_jax.errors import UserError
from senano_jax.optim.config import AdamRule, Cooldown, MuonRule, Ramp, Recipe
from senano_jax.presets import PRESETS, preset

LOGS = Path(__file__).parents[1] / "logs"
COMMITTED = LOGS / "recurrent-h200-20-steps/config.json"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(tmp_path, name):
    """Whatever its model and its optimiser, to the last value and type."""
    write_config(tmp_path / "config.json", preset(name), name, 1)
    assert read_config(tmp_path / "config.json") == (preset(name), name)


def test_a_file_written_before_there_were_other_systems_is_read():
    """Fields that did not exist have the values that made no difference."""
    config, name = read_config(COMMITTED)
    assert name == "recurrent"
    assert (config.model, config.optimizer) == (preset("recurrent").model, preset("recurrent").optimizer)


@pytest.mark.parametrize("path", sorted(LOGS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_the_optimisers_of_all_committed_runs_are_read_as_recipes(path):
    """Their flat fields become those of the preset's recipe: llmc's run had a warm-up of 20 steps, all else is as it is
    now, and a file written again is read as the same."""
    config, name = read_config(path)
    expected = preset(name).optimizer
    if name == "llmc":
        expected = changed(expected, {"schedule.warmup_steps": 20})
    assert config.optimizer == expected


@pytest.mark.parametrize("kind", [{}, {"kind": "MuonAdamConfig"}])
def test_every_flat_field_has_its_place(tmp_path, kind):
    """With and without the kind that the last of the earlier versions wrote; none is lost or taken for another."""
    document = json.loads(COMMITTED.read_text())
    flat = {
        **{"muon_lr": 0.1, "head_lr": 0.2, "embed_lr": 0.3, "scalar_lr": 0.4, "adam_b1": 0.5, "adam_b2": 0.6},
        **{"adam_eps": 0.7, "momentum_start": 0.8, "momentum_end": 0.9, "momentum_warmup_steps": 10},
        **{"cooldown_fraction": 0.11, "final_lr_factor": 0.12},
    }
    assert flat.keys() == document["optimizer"].keys()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document | {"optimizer": kind | flat}))
    assert read_config(path)[0].optimizer == Recipe(
        matrices=MuonRule(rate=0.1, momentum=Ramp(start=0.8, end=0.9, warmup_steps=10)),
        head=AdamRule(rate=0.2, b1=0.5, b2=0.6, eps=0.7),
        embeddings=AdamRule(rate=0.3, b1=0.5, b2=0.6, eps=0.7),
        scalars=AdamRule(rate=0.4, b1=0.5, b2=0.6, eps=0.7),
        schedule=Cooldown(fraction=0.11, floor=0.12),
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"muon_lr": "x"}, r"optimizer\.matrices\.rate is 'x'"),
        ({"adam_b1": None}, r"optimizer\.head\.b1 is 'None'"),
        ({"extra": 1}, r"unknown field optimizer\.extra"),
        ({"head": 1}, r"optimizer\.head is '1'"),
        ({"schedule": []}, r"optimizer\.schedule is '\[\]'"),
    ],
)
def test_a_damaged_flat_field_is_named_by_its_new_place(tmp_path, damage, message):
    """In one line, whatever stands there."""
    document = json.loads(COMMITTED.read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document | {"optimizer": document["optimizer"] | damage}))
    with pytest.raises(UserError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "message"),
    [
        ("llmc", "optimizer", "clip_norm", "1", r"optimizer\.clip_norm is '1'"),
        ("llmc", "model", "num_layers", None, r"model\.num_layers is 'None'"),
        ("recurrent", "optimizer", "matrices", [], r"optimizer\.matrices is '\[\]'"),
        ("recurrent", "optimizer", "head", [], r"optimizer\.head is '\[\]'"),
        ("recurrent", "optimizer", "head", {"rate": "1"}, r"field optimizer\.head\.b1 is missing"),
        ("recurrent", "optimizer", "matrices", {"kind": "Sgd"}, r"optimizer\.matrices\.kind is 'Sgd'"),
        ("llmc", "optimizer", "muon_lr", 0.05, r"unknown field optimizer\.muon_lr"),
    ],
)
def test_a_damaged_field_is_named_in_the_part_that_it_belongs_to(tmp_path, name, part, field, value, message):
    """The model and the optimiser are told by the fields they have, one strange field among them or not."""
    path = tmp_path / "config.json"
    write_config(path, preset(name), name, 1)
    document = json.loads(path.read_text())
    document[part][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        read_config(path)


@pytest.mark.parametrize("value", [[0, 4.0], [True], "0,4", 4, {"0": 4}])
def test_a_list_of_layers_holds_integers(tmp_path, value):
    """And nothing that only looks like it."""
    path = tmp_path / "config.json"
    write_config(path, preset("value-embeddings"), "value-embeddings", 1)
    document = json.loads(path.read_text())
    document["model"]["layers"]["long_windows"] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"model\.layers\.long_windows(\[\d\])? is"):
        read_config(path)
