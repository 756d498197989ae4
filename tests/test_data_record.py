"""data.json: what it says of the shards, when it says it, and which shards a resumed run accepts."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from senano_jax.data.fineweb import CHECKSUMS, Published, add_published
from senano_jax.data.identity import needed_shards
from senano_jax.data.shards import write_shard
from senano_jax.errors import UserError
from senano_jax.runlog import data_record
from senano_jax.runlog.data_record import DataRecord, read_data
from senano_jax.training.resume import OpenRun
from senano_jax.training.state import TrainState


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def paths(tmp_path):
    """Three training shards of one size and a validation shard, by part."""
    (tmp_path / "shards").mkdir()
    train = [tmp_path / "shards" / f"train_{k}.bin" for k in (1, 2, 3)]
    for k, path in enumerate(train):
        write_shard(path, [k] * 100)
    write_shard(tmp_path / "shards" / "val.bin", [7] * 50)
    return {"train": train, "val": [tmp_path / "shards" / "val.bin"]}


@pytest.fixture
def started(tmp_path, paths):
    """The folder of a run that was started with these shards."""
    with DataRecord(tmp_path, paths) as record:
        record.start()
        record.wait()
    return tmp_path


def go_on(folder, paths, steps_done=0) -> list[str]:
    """What a run resumed after so many steps with these shards says."""
    said = []
    with DataRecord(folder, paths) as record:
        record.go_on(said.append, steps_done)
        record.wait()
    return said


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (99, 1), (100, 2), (199, 2), (299, 3)])
def test_shards_are_needed_up_to_the_last_target(paths, tokens, count):
    assert needed_shards(paths["train"], tokens) == paths["train"][:count]


def test_every_shard_is_described(started, paths):
    shards = read_data(started)
    for part in ("train", "val"):
        assert [(s.name, s.sha256) for s in shards[part]] == [(path.name, digest(path)) for path in paths[part]]
    assert [(s.bytes, s.tokens) for s in shards["train"]] == [(1024 + 200, 100)] * 3
    assert all(s.published_sha256 is None for s in shards["train"])


def test_what_was_published_is_copied_from_beside_the_shard(tmp_path, paths):
    add_published(paths["val"][0].parent, "val.bin", Published("https://hub/val.bin", "0" * 64))
    with DataRecord(tmp_path, paths) as record:
        record.start()
    (shard,) = read_data(tmp_path)["val"]
    assert (shard.published_url, shard.published_sha256) == ("https://hub/val.bin", "0" * 64)


def test_names_are_known_before_checksums(tmp_path, paths, monkeypatch):
    """A run that is killed meanwhile leaves them; it had no checkpoint, and gets its checksums when it goes on."""

    def killed(path):
        raise UserError("killed")

    with monkeypatch.context() as patch, DataRecord(tmp_path, paths) as record:
        patch.setattr(data_record, "sha256_of", killed)
        record.start()
        with pytest.raises(UserError, match="killed"):
            record.wait()
    assert [(shard.name, shard.sha256) for shard in read_data(tmp_path)["val"]] == [("val.bin", None)]
    assert go_on(tmp_path, paths) == []
    assert read_data(tmp_path)["val"][0].sha256 == digest(paths["val"][0])


def test_steps_done_without_checksums_are_told(tmp_path, paths, monkeypatch):
    """A checkpoint is saved though the checksums failed: nobody can tell whether it was trained on these tokens."""
    with monkeypatch.context() as patch, DataRecord(tmp_path, paths) as record:
        patch.setattr(record, "_write_checksums", lambda: None)
        record.start()
    (said,) = go_on(tmp_path, paths, steps_done=60)
    assert "data.json has no checksums: that the shards are those of the beginning is not fully checked" in said
    assert read_data(tmp_path)["val"][0].sha256 == digest(paths["val"][0])


def test_a_shard_that_vanishes_is_named(tmp_path, paths):
    with DataRecord(tmp_path, paths) as record:
        paths["train"][1].unlink()
        record.start()
        with pytest.raises(UserError, match=r"cannot read the shard .*train_2\.bin \(No such file"):
            record.wait()


def test_the_same_shards_in_another_folder_go_on(started, paths, tmp_path):
    before = (started / "data.json").read_bytes()
    moved = shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    assert go_on(started, {part: [moved / path.name for path in paths[part]] for part in paths}) == []
    assert (started / "data.json").read_bytes() == before


def test_one_changed_token_is_noticed(started, paths):
    write_shard(paths["train"][2], [2] * 99 + [3])
    with pytest.raises(UserError, match=r"--resume: train shard 3, .*train_3\.bin, has sha256 .* was started with"):
        go_on(started, paths)


def test_a_missing_first_shard_is_noticed_by_the_name_of_the_next(started, paths):
    """All shards but the last have one size, so sizes would not tell."""
    with pytest.raises(UserError, match=r"train shard 1, .* has name train_2\.bin, .* with train_1\.bin .*data\.json"):
        go_on(started, paths | {"train": paths["train"][1:]})


def test_another_size_is_noticed(started, paths):
    write_shard(paths["val"][0], [7] * 51)
    with pytest.raises(UserError, match=r"val shard 1, .*val\.bin, has bytes 1126, .* with 1124"):
        go_on(started, paths)


def test_fewer_shards_are_noticed(started, paths):
    with pytest.raises(UserError, match="needs 2 train shards and was started with 3"):
        go_on(started, paths | {"train": paths["train"][:2]})


def test_a_run_without_the_file_goes_on_and_says_so(tmp_path, paths):
    (said,) = go_on(tmp_path, paths)
    assert "data.json is missing" in said
    assert not (tmp_path / "data.json").exists(), "nobody knows what the run began with"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "not a JSON object"),
        ('{"train": []}', "val is not a list"),
        ('{"train": [{"name": "a"}], "val": []}', r"train\[0\]\.bytes is missing"),
        ('{"train": [{"name": "a", "bytes": 1, "tokens": "x"}], "val": []}', r"train\[0\]\.tokens is 'x'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, paths, content, reason):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=rf"data\.json: .*{reason}"):
        go_on(tmp_path, paths)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"url": "u", "sha256": "0"}}', '{"a": {"url": "u"}}'])
def test_damaged_published_checksums_are_named(paths, tmp_path, content):
    (tmp_path / "shards" / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=r"published\.json is damaged; delete it"):
        DataRecord(tmp_path, paths)


def test_the_record_is_plain_json(started):
    document = json.loads((started / "data.json").read_text())
    assert list(document) == ["train", "val"]
    assert list(document["val"][0]) == ["name", "bytes", "tokens", "sha256", "published_sha256", "published_url"]


def test_what_was_trained_is_saved_though_the_checksums_cannot_be_written(tmp_path, paths, monkeypatch):
    """Such as on a disk that was full for a moment, or for a shard that was deleted before it was read."""

    class Kept(list):
        def save(self, step, *_):
            self.append(step)

    def full(file, shards):
        raise UserError(f"{file} cannot be written (No space left on device)")

    run = OpenRun(SimpleNamespace(position=dict), Kept(), DataRecord(tmp_path, paths))
    with run.data_record:
        monkeypatch.setattr(DataRecord, "_write_checksums", lambda self: full(self._file, {}))
        run.data_record.start()
        with pytest.raises(UserError, match=r"data\.json cannot be written"):
            run.save(60, TrainState(jnp.zeros(()), {}, ()), 0, 0.0, None)
    assert run.checkpoints == [60]
