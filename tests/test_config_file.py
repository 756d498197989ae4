"""config.json: what is written is read back, and files of earlier versions still are."""

import json
from pathlib import Path

import pytest

from senano_jax.config_file import read_config, write_config
from senano_jax.errors import UserError
from senano_jax.presets import PRESETS, preset

COMMITTED = Path(__file__).parents[1] / "logs/recurrent-h200-20-steps/config.json"


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


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "message"),
    [
        ("llmc", "optimizer", "clip_norm", "1", r"optimizer\.clip_norm is '1'"),
        ("llmc", "model", "num_layers", None, r"model\.num_layers is 'None'"),
        ("recurrent", "optimizer", "muon_lr", [], r"optimizer\.muon_lr is '\[\]'"),
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
