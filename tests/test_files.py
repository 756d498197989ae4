"""What a path argument names."""

import pytest

from senano_jax.files import expand, expand_home, plainly_named


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_is_expanded(home):
    assert expand_home("~/logs/run") == home / "logs" / "run"
    assert expand_home("logs/~/run").parts == ("logs", "~", "run")
    for unknown in ("~no-such-user/x", "~\0", "~\ud800"):
        assert str(expand_home(unknown)) == unknown


def test_globs_in_the_home_folder_match_in_order(home):
    (home / "deep").mkdir()
    files = [home / "b.bin", home / "a.bin", home / "deep" / "c.bin"]
    for file in files:
        file.touch()
    assert expand("~/*.bin") == sorted(files[:2])
    assert expand("~/**/*.bin") == sorted(files)
    assert expand(home / "?.bin") == sorted(files[:2])


def test_a_path_that_exists_is_no_glob(tmp_path):
    bracketed, matched = tmp_path / "run[1]", tmp_path / "run1"
    bracketed.touch()
    matched.touch()
    assert expand(bracketed) == [bracketed]
    assert expand(tmp_path / "run[12]") == [matched]


def test_folders_that_exist_are_no_globs_either(tmp_path):
    (tmp_path / "shards [1]").mkdir()
    files = [tmp_path / "shards [1]" / name for name in ("a.bin", "b.bin")]
    for file in files:
        file.touch()
    assert expand(tmp_path / "shards [1]" / "*.bin") == files


@pytest.mark.parametrize("name", ["plain", "with space", "[1]", "a\\b", "\udce9", "{x}%s"])
def test_a_folder_gets_a_name_that_libraries_can_take(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    with plainly_named(folder) as plain:
        assert not set("[]\\\udce9") & set(str(plain))
        (plain / "file").touch()
    assert (folder / "file").exists() and plain.exists() == (plain == folder)


@pytest.mark.parametrize("pattern", ["no-such-*", "no-such-file", "a\0*", "[", "~\0", ""])
def test_what_names_nothing(pattern):
    assert expand(pattern) == []
