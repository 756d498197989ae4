"""Compiled steps are found by what they are made from, compute the same bits, and are those of no other program."""

import contextlib
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from kept_steps import FILES, arguments_of, configured, kept_steps, trained, wait_for_writers

from senano_jax import train
from senano_jax.config import Stage
from senano_jax.training import step_cache
from senano_jax.training.own import NOTHING_OWN, Own
from senano_jax.training.step import StepMetrics
from senano_jax.training.step_cache import StepCache, compiled_step, open_step_cache
from senano_jax.training.wiring import wire

files_of_package = step_cache._files
folder = pytest.fixture(autouse=True)(kept_steps)


@pytest.fixture
def config(folder):
    return configured(folder)


def test_a_second_run_computes_the_same_without_lowering(folder, tmp_path, monkeypatch):
    """Two stages of one shape and one of another, each device with its share of the averages."""
    stages = (Stage(part=1), Stage(part=1), Stage(part=2, batch_tokens=1024))
    config = dataclasses.replace(configured(folder, "--share-matrices"), stages=stages)
    losses = trained(config, tmp_path / "first", keeps_steps=True)
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".step"] * 2
    assert trained(config, tmp_path / "without") == losses

    def fails(*_):
        raise AssertionError("lowered")

    monkeypatch.setattr(step_cache, "compile_kernels_beside", fails)
    assert trained(config, tmp_path / "second", keeps_steps=True) == losses
    assert sorted(folder.iterdir()) == files


def cache_of(folder, config, mesh):
    return StepCache(folder, FILES, config, mesh)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer.matrices.rate=0.01"],
        ["--steps=5"],
        ["--model.cap.height=20"],
        ["--dtype=bfloat16"],
        ["--batch-tokens=1024"],
        ["--devices=1"],
        ["--share-matrices"],
        ["--reduce-dtype=bfloat16"],
    ],
)
def test_another_program_is_another_file(config, folder, flags):
    paths = set()
    for one in (config, configured(folder, *flags)):
        wiring = wire(one)
        paths.add(cache_of(folder, one, wiring.mesh).path(None, arguments_of(wiring)))
    assert len(paths) == 2


def test_files_versions_settings_and_visits_count(config, folder, monkeypatch):
    wiring = wire(config)
    arguments = arguments_of(wiring)

    def path(visits=None, files=FILES):
        return StepCache(folder, files, config, wiring.mesh).path(visits, arguments)

    paths = [path(), path(visits=2), path(files={"senano_jax/train.py": "edited"})]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    paths.append(path())
    before = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", "high")  # which no run asks for
        paths.append(path())
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    monkeypatch.setattr(step_cache.importlib.metadata, "distributions", lambda: [])
    paths.append(path())
    assert len(set(paths)) == len(paths)
    assert path() == paths[-1]


def test_no_step_depends_on_what_does_not_count(config, folder):
    others = dict.fromkeys(step_cache._OF_A_RUN)
    others |= {"seed": 7, "val_every": 1, "checkpoint_every": 1, "checkpoint_keep": 3, "checkpoint_keep_every": 1}
    others |= {"data": dataclasses.replace(config.data, val_tokens=512), "init_from": "weights.safetensors"}
    texts, paths = set(), set()
    for one in (config, dataclasses.replace(config, **others)):
        wiring = wire(one)
        arguments = arguments_of(wiring)
        texts.add(wiring.train_steps[0].lower(*arguments).as_text())
        paths.add(cache_of(folder, one, wiring.mesh).path(None, arguments))
    assert len(texts) == len(paths) == 1


def test_files_that_have_changed_since_the_process_began_may_be_others(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "IMPORTED_AT", float("inf"))
        assert set(files_of_package()) >= {"senano_jax/model/gpt.py", "senano_jax/training/step.py"}
    edited = tmp_path / "edited.py"
    edited.touch()
    os.utime(edited, (0, 0))  # as a copy brings it
    for changed in (edited, Path("/nowhere/replaced.py")):
        monkeypatch.setattr(step_cache, "package_files", lambda changed=changed: [changed])
        assert files_of_package() is None


def small_step(state, x):
    return state + x, StepMetrics(x, x)


SMALL_ARGUMENTS = (np.float32(1), np.float32(2))


@pytest.mark.parametrize("damage", [lambda sound: sound[:100], lambda sound: sound[:-1] + b"?", lambda sound: b""])
def test_a_damaged_step_is_none(config, folder, damage):
    mesh = wire(config).mesh
    cache, again, damaged = (cache_of(folder, config, mesh) for _ in range(3))
    file = cache.path(None, SMALL_ARGUMENTS)
    cache.keep(file, jax.jit(small_step).lower(*SMALL_ARGUMENTS).compile()).join()
    assert again.find(file, SMALL_ARGUMENTS) is not None
    file.write_bytes(damage(file.read_bytes()))
    assert damaged.find(file, SMALL_ARGUMENTS) is None


def test_a_step_that_jax_had_is_not_written(config, folder):
    """XLA for CPUs writes such a step without its functions, and says so when it runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    mesh, written = wire(config).mesh, []
    for place in (folder, folder.with_name("others")):
        cache = cache_of(place, config, mesh)
        step = compiled_step(jax.jit(lambda state, x: small_step(state, x)), None, SMALL_ARGUMENTS, cache)
        assert cache.find(cache.path(None, SMALL_ARGUMENTS), SMALL_ARGUMENTS) is step  # for a second stage
        wait_for_writers()
        written.append(place.exists())
    assert written == [True, False]


def test_a_folder_that_cannot_be_written_is_no_fault(config, folder):
    folder.parent.mkdir()
    folder.write_text("in the way")
    cache = cache_of(folder, config, wire(config).mesh)
    file = cache.path(None, SMALL_ARGUMENTS)
    cache.keep(file, jax.jit(small_step).lower(*SMALL_ARGUMENTS).compile()).join()
    assert cache.find(file, SMALL_ARGUMENTS) is None and folder.read_text() == "in the way"


def test_steps_that_have_not_been_used_for_longest_are_forgotten(config, folder, monkeypatch):
    monkeypatch.setattr(step_cache, "KEPT", 2)
    cache = cache_of(folder, config, wire(config).mesh)
    compiled = jax.jit(small_step).lower(*SMALL_ARGUMENTS).compile()
    files = [cache.path(visits, SMALL_ARGUMENTS) for visits in range(3)]
    for file in files:
        cache.keep(file, compiled).join()
    assert set(folder.iterdir()) == set(files[1:])


def test_a_step_from_disk_consumes_the_state_as_well(config, folder, monkeypatch):
    wiring = wire(config)
    compiled = wiring.train_steps[0].lower(*arguments_of(wiring)).compile()
    cache, arguments = cache_of(folder, config, wiring.mesh), arguments_of(wiring)
    file = cache.path(None, arguments)
    cache.keep(file, compiled).join()
    with monkeypatch.context() as patch:
        patch.setattr(step_cache.os, "getuid", lambda: 12345)
        assert cache.find(file, arguments) is None  # somebody else's
    found = cache.find(file, arguments)
    state, metrics = found(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0].params))
    assert int(state.step) == 1 and np.isfinite(float(metrics.loss))


def test_where_no_steps_are_kept(config, folder, monkeypatch):
    mesh = wire(config).mesh
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    assert open_step_cache(config, NOTHING_OWN, mesh) is not None
    assert open_step_cache(config, Own(optimizer=optax.sgd(0.1)), mesh) is None
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "on_gpu", lambda: False)
        assert open_step_cache(config, NOTHING_OWN, mesh) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert open_step_cache(config, NOTHING_OWN, mesh) is None
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "_files", lambda: None)
        assert open_step_cache(config, NOTHING_OWN, mesh) is None
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert open_step_cache(config, NOTHING_OWN, mesh) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for elsewhere in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert open_step_cache(config, NOTHING_OWN, mesh) is None


@pytest.mark.parametrize(("first", "keeps"), [("demo", True), ("mine.py:small", False)])
def test_the_command_keeps_steps_unless_it_runs_a_file_that_may_replace_functions(tmp_path, monkeypatch, first, keeps):
    (tmp_path / "mine.py").write_text("from senano_jax import preset\n\n\ndef small():\n    return preset('demo')\n")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(train, "run", lambda request, keeps_steps: asked.append(keeps_steps))
    monkeypatch.setattr(train, "import_jax", lambda: None)
    monkeypatch.setattr("senano_jax.training.processes.leave_at_once_on_failure", contextlib.nullcontext)
    train.command([first, "--steps=1"])
    assert asked == [keeps]
