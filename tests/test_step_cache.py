"""Compiled steps are found by what they are made from, compute the same bits, and are those of no other program."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from senano_jax import train
from senano_jax.config import Stage
from senano_jax.training import step_cache
from senano_jax.training.loop import train as run
from senano_jax.training.mesh import place_batch
from senano_jax.training.own import NOTHING_OWN, Own
from senano_jax.training.state import init_state
from senano_jax.training.step import StepMetrics
from senano_jax.training.step_cache import StepCache, compiled_step, open_step_cache
from senano_jax.training.wiring import wire

SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0", "--steps=4",
    "--batch-tokens=512", "--seq-len=256", "--final-window-tokens=256", "--data.val-tokens=512",
    "--data.val-seq-len=256", "--devices=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """That of the steps, on a machine which looks as if it had a GPU where the step cache asks for one."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(step_cache, "on_gpu", lambda: True)
    monkeypatch.setattr(step_cache, "FILES", {"senano_jax/train.py": "as it is"})
    before = jax.config.jax_compilation_cache_dir
    reset_cache()  # JAX's own: it is the one of the folder that is asked for first
    yield tmp_path / "cache" / "steps"
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


@pytest.fixture
def config(folder):
    return configured(folder)


def configured(folder, *flags):
    return train.parse_request([*SMALL, f"--compilation-cache={folder.parent}", *flags]).config


def trained(config, path, **options):
    """What a run reports of its steps, the times left out."""
    folder = run(dataclasses.replace(config, run_dir=str(path)), "demo", quiet=True, **options)
    for writer in threading.enumerate():
        if writer.name == "step cache":
            writer.join()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if "ms" not in name and "per_s" not in name} for r in records]


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


def arguments_of(wiring):
    """Those of the first step, with shapes and places alone that matter."""
    stage = wiring.plan.stages[0]
    tokens = np.zeros((stage.sequences, stage.seq_len + 1), np.uint16)
    state = wiring.to_shared(init_state(wiring.model, wiring.optimizer, 0, wiring.mesh))
    return state, place_batch(wiring.mesh, tokens, wiring.micro_batches[0]), *wiring.plan.inputs(0)


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
        paths.add(StepCache(folder, one, wiring.mesh)._path(None, arguments_of(wiring)))
    assert len(paths) == 2


def test_files_versions_settings_and_visits_count(config, folder, monkeypatch):
    wiring = wire(config)
    arguments = arguments_of(wiring)

    def path(visits=None):
        return StepCache(folder, config, wiring.mesh)._path(visits, arguments)

    paths = [path(), path(visits=2)]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    paths.append(path())
    before = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", "high")  # which no run asks for
        paths.append(path())
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    monkeypatch.setattr(step_cache, "FILES", {"senano_jax/train.py": "edited"})
    paths.append(path())
    monkeypatch.setattr(step_cache.importlib.metadata, "distributions", lambda: [])
    paths.append(path())
    assert len(set(paths)) == len(paths)
    assert path() == paths[-1]


def test_no_step_depends_on_what_does_not_count(config, folder):
    others = dict.fromkeys(step_cache._OF_A_RUN)
    others |= {"seed": 7, "val_every": 1, "checkpoint_every": 1, "checkpoint_keep": 3, "checkpoint_keep_every": 1}
    others |= {"data": dataclasses.replace(config.data, val_tokens=256), "init_from": "weights.safetensors"}
    texts, paths = set(), set()
    for one in (config, dataclasses.replace(config, **others)):
        wiring = wire(one)
        arguments = arguments_of(wiring)
        texts.add(wiring.train_steps[0].lower(*arguments).as_text())
        paths.add(StepCache(folder, one, wiring.mesh)._path(None, arguments))
    assert len(texts) == len(paths) == 1


def test_files_that_are_younger_than_the_process_may_be_others(monkeypatch):
    assert set(step_cache._files()) >= {"senano_jax/model/gpt.py", "senano_jax/training/step.py"}
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "IMPORTED_AT", 0)
        assert step_cache._files() is None
    monkeypatch.setattr(step_cache, "package_files", lambda: [Path("/nowhere/replaced.py")])
    assert step_cache._files() is None


def small_step(state, x):
    return state + x, StepMetrics(x, x)


SMALL_ARGUMENTS = (np.float32(1), np.float32(2))


@pytest.mark.parametrize("damage", [lambda sound: sound[:100], lambda sound: sound[:-1] + b"?", lambda sound: b""])
def test_a_damaged_step_is_none(config, folder, damage):
    mesh = wire(config).mesh
    compiled = jax.jit(small_step).lower(*SMALL_ARGUMENTS).compile()
    StepCache(folder, config, mesh).keep(None, SMALL_ARGUMENTS, compiled).join()
    (file,) = folder.iterdir()
    assert StepCache(folder, config, mesh).find(None, SMALL_ARGUMENTS) is not None
    file.write_bytes(damage(file.read_bytes()))
    assert StepCache(folder, config, mesh).find(None, SMALL_ARGUMENTS) is None


def test_a_step_that_jax_had_is_not_written(config, folder):
    """XLA for CPUs writes such a step without its functions, and says so when it runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    mesh, written = wire(config).mesh, []
    for place in (folder, folder.with_name("others")):
        cache = StepCache(place, config, mesh)
        step = compiled_step(jax.jit(lambda state, x: small_step(state, x)), None, SMALL_ARGUMENTS, cache)
        assert cache.find(None, SMALL_ARGUMENTS) is step  # for a second stage
        for writer in threading.enumerate():
            if writer.name == "step cache":
                writer.join()
        written.append(place.exists())
    assert written == [True, False]


def test_a_folder_that_cannot_be_written_is_no_fault(config, folder):
    folder.parent.mkdir()
    folder.write_text("in the way")
    cache = StepCache(folder, config, wire(config).mesh)
    cache.keep(None, SMALL_ARGUMENTS, jax.jit(small_step).lower(*SMALL_ARGUMENTS).compile()).join()
    assert cache.find(None, SMALL_ARGUMENTS) is None and folder.read_text() == "in the way"


def test_steps_that_have_not_been_used_for_longest_are_forgotten(config, folder, monkeypatch):
    monkeypatch.setattr(step_cache, "KEPT", 2)
    cache = StepCache(folder, config, wire(config).mesh)
    step = jax.jit(lambda x, y: (x, y))
    for length in range(3):
        cache.keep(None, (np.zeros(length),), step.lower(np.zeros(length), 0).compile()).join()
    names = {path.name for path in folder.iterdir()}
    assert names == {cache._path(None, (np.zeros(length),)).name for length in (1, 2)}


def test_a_step_from_disk_consumes_the_state_as_well(config, folder, monkeypatch):
    wiring = wire(config)
    compiled = wiring.train_steps[0].lower(*arguments_of(wiring)).compile()
    StepCache(folder, config, wiring.mesh).keep(None, arguments_of(wiring), compiled).join()
    arguments = arguments_of(wiring)
    with monkeypatch.context() as patch:
        patch.setattr(step_cache.os, "getuid", lambda: 12345)
        assert StepCache(folder, config, wiring.mesh).find(None, arguments) is None  # somebody else's
    found = StepCache(folder, config, wiring.mesh).find(None, arguments)
    state, metrics = found(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0].params))
    assert int(state.step) == 1 and np.isfinite(float(metrics.loss))


def test_where_no_steps_are_kept(config, folder, monkeypatch):
    wiring = wire(config)
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    assert open_step_cache(config, NOTHING_OWN, wiring) is not None
    assert open_step_cache(config, Own(optimizer=optax.sgd(0.1)), wiring) is None
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "on_gpu", lambda: False)
        assert open_step_cache(config, NOTHING_OWN, wiring) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert open_step_cache(config, NOTHING_OWN, wiring) is None
    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "FILES", None)
        assert open_step_cache(config, NOTHING_OWN, wiring) is None
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert open_step_cache(config, NOTHING_OWN, wiring) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for elsewhere in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert open_step_cache(config, NOTHING_OWN, wiring) is None


def test_tables_of_prefixes_are_no_part_of_the_configuration(config, folder):
    """The step holds them, and they are read from a folder's files."""
    stage = dataclasses.replace(train.parse_request(["prefix"]).config.stages[0])
    wiring = wire(config)
    planned = [dataclasses.replace(wiring.plan.stages[0], prefix=stage.prefix)]
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    wiring.plan.stages = planned
    assert planned[0].has_prefix and open_step_cache(config, NOTHING_OWN, wiring) is None


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
