"""The next stage's step is compiled in a thread, is the one that the run then takes, and never costs a run anything."""

import dataclasses
import threading
import types

import pytest
from kept_steps import FILES, arguments_of, configured, kept_steps, trained

from senano_jax.config import Stage
from senano_jax.training import next_stage, step_cache
from senano_jax.training.next_stage import NextStage, has_room_beside
from senano_jax.training.step_cache import StepCache
from senano_jax.training.wiring import wire

folder = pytest.fixture(autouse=True)(kept_steps)

# A stage for each step; the second one has the first one's program.
STAGES = (Stage(part=1), Stage(part=1, rate=0.5), Stage(part=1, batch_tokens=1024, seq_len=128))


class Running:
    """As much of a compiled step as is asked. ROOM is what a device must have for it and for what XLA times: its
    arguments, once where a result takes their place; its temporaries twice; and 2 GiB."""

    @staticmethod
    def memory_analysis():
        return types.SimpleNamespace(
            argument_size_in_bytes=10,
            output_size_in_bytes=7,
            alias_size_in_bytes=6,
            temp_size_in_bytes=100,
            generated_code_size_in_bytes=1,
        )


RUNNING = Running()
ROOM = 10 + 7 - 6 + 2 * 100 + 2 * 2**30


@pytest.fixture
def config(folder):
    config = configured(folder, "--share-matrices", "--final-window-tokens=128", "--steps=3")
    return dataclasses.replace(config, stages=STAGES)


@pytest.fixture
def compiling(monkeypatch):
    """The threads that compiled a step, as they came to it."""
    threads = []
    monkeypatch.setattr(
        step_cache, "compile_kernels_beside", lambda lowered: threads.append(threading.current_thread().name)
    )
    return threads


def test_a_run_compiles_its_first_step_alone(config, tmp_path, compiling):
    """That such a run computes the same as one without compiled steps: test_step_cache.py."""
    records = trained(config, tmp_path / "run", keeps_steps=True)
    assert [name.partition("_")[0] for name in compiling] == ["MainThread", "next stage"]
    assert records[-1]["step"] == 3


def test_what_is_compiled_is_what_the_stage_asks_for(config, folder, compiling):
    """Types, places and shapes of all arguments, for every stage: another one would be compiled when it is due."""
    wiring = wire(config)
    cache = StepCache(folder, FILES, config, wiring.mesh)
    state, tokens, *_ = arguments_of(wiring)
    ahead = NextStage(wiring, cache)
    for stage in wiring.plan.stages[1:]:
        ahead.begin(stage.index, RUNNING, state, tokens)
        ahead.wait()
        assert cache.path(stage.visits, arguments_of(wiring, stage.index)) in cache._known
    assert len(cache._known) == 2


@pytest.mark.parametrize(("device", "begins"), [(ROOM, True), (ROOM - 1, False)])
def test_nothing_is_compiled_beside_a_step_whose_temporaries_do_not_fit_in_twice(
    device, begins, config, folder, monkeypatch, compiling
):
    """It is then compiled when it is due, as one is whose compilation failed."""
    monkeypatch.setattr(next_stage, "device_bytes", lambda mesh: device)
    wiring = wire(config)
    state, tokens, *_ = arguments_of(wiring)
    ahead = NextStage(wiring, StepCache(folder, FILES, config, wiring.mesh))
    ahead.begin(2, RUNNING, state, tokens)
    ahead.wait()
    assert len(compiling) == begins


def test_where_nobody_can_tell_the_memory_nothing_is_compiled_ahead():
    assert not has_room_beside(types.SimpleNamespace(memory_analysis=lambda: None), device=2**60)


def test_what_the_cache_has_is_loaded_without_room(config, folder, monkeypatch, compiling):
    """As no kernel is timed for it."""
    wiring = wire(config)
    state, tokens, *_ = arguments_of(wiring)
    first = StepCache(folder, FILES, config, wiring.mesh)
    step, arguments = wiring.train_steps[2], arguments_of(wiring, 2)
    path = first.path(STAGES[2].visits, arguments)
    first.keep(path, step.lower(*arguments).compile()).join()
    monkeypatch.setattr(next_stage, "device_bytes", lambda mesh: 0)
    second = StepCache(folder, FILES, config, wiring.mesh)
    ahead = NextStage(wiring, second)
    ahead.begin(2, RUNNING, state, tokens)
    ahead.wait()
    assert compiling == [] and list(second._known) == [path]


def test_without_a_cache_and_behind_the_last_stage_nothing_begins(config, folder, monkeypatch):
    monkeypatch.setattr(next_stage, "compiled_step", None)
    wiring = wire(config)
    for cache, index in ((None, 1), (StepCache(folder, FILES, config, wiring.mesh), len(STAGES))):
        ahead = NextStage(wiring, cache)
        ahead.begin(index, RUNNING, state=None, tokens=None)
        ahead.wait()


def test_what_fails_ahead_of_time_is_compiled_when_it_is_due(config, tmp_path, monkeypatch, compiling):
    def fails(*_):
        raise RuntimeError("no memory for it now")

    monkeypatch.setattr(next_stage, "compiled_step", fails)
    records = trained(config, tmp_path / "failing", keeps_steps=True)
    assert compiling == ["MainThread"] * 2 and records[-1]["step"] == 3


def test_a_run_that_ends_does_not_wait(config, folder, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def waits(*_):
        begun.set()
        release.wait()

    monkeypatch.setattr(next_stage, "compiled_step", waits)
    wiring = wire(config)
    state, tokens, *_ = arguments_of(wiring)
    ahead = NextStage(wiring, StepCache(folder, FILES, config, wiring.mesh))
    ahead.begin(1, RUNNING, state, tokens)
    assert begun.wait(60)
    ahead.close()  # this test would never end
    release.set()
