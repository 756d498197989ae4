"""The profile command on a tiny model, the tokens it takes, and how it compiles and times."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax.attention import END_OF_TEXT
from senano_jax.data import sample
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.profile import main
from senano_jax.profiling.compilation import compile_program, executed_work, planned_memory
from senano_jax.profiling.timing import Spread, StepRunner
from senano_jax.profiling.tokens import MEAN_DOCUMENT, open_feed, synthetic_sequences
from senano_jax.training.step import StepMetrics

TINY_DEMO = [
    *("demo", "--devices", "1", "--model.dim", "32", "--seq-len", "256", "--batch-tokens", "512"),
    *("--final-window-tokens", "256", "--data.val-seq-len", "256", "--data.val-tokens", "512"),
    *("--profile-steps", "3", "--warmup", "1", "--compilation-cache", "None"),
]


# The command


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Output and JSON of the command on a tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    flags = [
        "--sweep",
        "1",
        "--evaluation",
        "--trace-dir",
        str(folder / "trace"),
        "--json",
        str(folder / "profile.json"),
    ]
    command = [sys.executable, "-m", "senano_jax.profile", *TINY_DEMO, *flags]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("trace/**/*.xplane.pb"))
    return done.stdout, json.loads((folder / "profile.json").read_text())["report"]


def test_the_report_has_every_section(profiled):
    output, report = profiled
    for text in ("Compilation", "Arithmetic", "Memory", "back to back", "By window", "Evaluation", "Kernels by module"):
        assert text in output
    assert not report["loss_is_fused"] and "Head and loss: left to XLA" in output  # as on any CPU
    assert "\x1b" not in output  # no colours where there is no terminal


def test_compilation_and_memory_are_filled_in(profiled):
    _, report = profiled
    compilation = report["compilation"]
    assert min(compilation[phase] for phase in ("trace_s", "lower_s", "compile_s")) > 0
    assert compilation["cache"] == "off"
    assert report["executed"]["flops"] > 0 and report["executed"]["bytes"] > 0
    memory = report["memory"]
    assert memory["arguments"] > memory["aliased"] > 0.9 * memory["outputs"]  # the donated state
    assert memory["temporaries"] > 0


def test_speed_follows_from_the_median_step(profiled):
    _, report = profiled
    speed = report["speed"]
    assert (speed["window_blocks"], speed["step_ms"]["n"], report["token_source"]) == (2, 3, "the bundled sample")
    assert speed["tokens_per_s"] == pytest.approx(512 / speed["step_ms"]["median"] * 1000)
    assert report["peak_flops"] is None and speed["mfu"] is None  # nobody knows a CPU's
    assert [swept["window_blocks"] for swept in report["sweep"]] == [1]
    assert report["sweep"][0]["flops"]["attention"] < speed["flops"]["attention"]
    assert report["evaluation"]["tokens"] == 512 and report["evaluation"]["tokens_per_s"] > 0


def test_kernels_of_the_cpu_are_traced_back_to_modules(profiled):
    _, report = profiled
    times = report["kernels"]["times"]
    assert 0 < report["kernels"]["busy"] <= 1
    assert times["attributed"] > 0.8
    assert {"attention", "mlp", "head + loss", "optimiser"} <= {kernel["module"] for kernel in times["kernels"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window-blocks", "0"], "--window-blocks is 0"),
        (["--profile-steps", "0"], "--profile-steps is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--json", "/nowhere/profile.json"], "no folder /nowhere"),
        (["--json", "/tmp"], "is a folder"),
        (["--trace-dir", sample.TRAIN], "is a file"),
        (["--seq-len", "100"], "not a multiple of 128"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        main([*TINY_DEMO, *flags])


# Tokens, compilation, times


def small(**changes):
    return dataclasses.replace(preset("demo"), batch_tokens=1024, seq_len=512, **changes)


def with_shards(config, pattern):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train_files=pattern))


def feed_of(config, **options):
    return open_feed(config, Plan(config).stages[0], **options)


def test_xla_is_told_to_be_deterministic_before_a_device_is_looked_for(monkeypatch):
    """Without a preset, too, where the devices choose one."""

    def first_call(*_, deterministic=False):
        raise UserError(f"deterministic: {deterministic}")

    monkeypatch.setattr("senano_jax.jax_settings.start_jax", first_call)
    with pytest.raises(UserError, match="deterministic: True"):
        main(["--deterministic"])


def test_shards_are_read_again_when_they_run_out(tmp_path):
    tokens = np.arange(2100) % 1000
    write_shard(tmp_path / "a.bin", tokens)
    feed = feed_of(with_shards(small(), str(tmp_path / "*.bin")), shards_required=True)
    batches = [next(feed.batches) for _ in range(3)]
    assert feed.description.endswith("*.bin") and batches[0].shape == (2, 513)
    np.testing.assert_array_equal(batches[0].ravel()[:513], tokens[:513])
    np.testing.assert_array_equal(batches[2], batches[0])
    feed.batches.close()


def test_missing_shards_give_way_to_the_sample_and_then_to_synthetic_documents():
    config = with_shards(small(), "/nowhere/*.bin")
    feed = feed_of(config, shards_required=False)
    assert feed.description == "the bundled sample"
    feed.batches.close()
    longer = dataclasses.replace(config, batch_tokens=512 * (1 + len(open_shard(sample.TRAIN)) // 512))
    feed = feed_of(longer, shards_required=False)
    assert "synthetic" in feed.description
    assert next(feed.batches).shape == (longer.batch_sequences, 513)


def test_shards_asked_for_must_be_there_and_hold_a_step(tmp_path):
    with pytest.raises(UserError, match="no shard matches"):
        feed_of(with_shards(small(), "/nowhere/*.bin"), shards_required=True)
    write_shard(tmp_path / "a.bin", np.zeros(900, int))
    with pytest.raises(UserError, match="less than one step of 1,024 tokens"):
        feed_of(with_shards(small(), str(tmp_path / "a.bin")), shards_required=True)


def test_synthetic_documents_have_the_stated_mean_length():
    tokens = synthetic_sequences(8, 100_000, 50_257)
    assert tokens.size / (tokens == END_OF_TEXT).sum() == pytest.approx(MEAN_DOCUMENT, rel=0.2)
    assert tokens.min() >= 0 and tokens.max() == END_OF_TEXT


def test_a_second_compilation_is_a_hit_of_the_persistent_cache(tmp_path):
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    x = jnp.ones((64, 32))
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
        programs = [compile_program(jax.jit(lambda x: (x.T @ x).sum()), x) for _ in range(2)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    assert [program.compilation.cache for program in programs] == ["miss", "hit"]
    assert float(programs[1].run(x)) == 64 * 32 * 32
    assert executed_work(programs[0].run).flops >= 2 * 64 * 32 * 32
    assert planned_memory(programs[0].run).arguments == 64 * 32 * 4


def test_a_spread_is_that_of_its_sample():
    assert Spread.of(range(11)) == Spread(median=5, min=0, p10=1, p90=9, max=10, n=11, times=tuple(range(11)))


def test_times_back_to_back_are_those_of_a_device_that_takes_little_ahead(monkeypatch):
    """Calls return when 30 ms of their step are left, as on a GPU whose queue of kernels is full until then."""
    now, free = 0.0, 0.0  # seconds; `free` is when the device has done all that it was given

    class Loss:
        def __init__(self, ready):
            self.ready = ready

        def copy_to_host_async(self):
            pass

        def __float__(self):
            nonlocal now
            now = max(now, self.ready)
            return 0.0

    class Runner(StepRunner):
        def __init__(self):
            pass

        def _place(self):
            return None

        def _queue(self, tokens, window):
            nonlocal now, free
            free = max(now, free) + 0.1
            now = max(now, free - 0.03)
            return StepMetrics(Loss(free), Loss(free))

    monkeypatch.setattr("senano_jax.profiling.timing.time.perf_counter", lambda: now)
    steps, host = Runner().pipelined(5, window=1)
    assert steps.times == pytest.approx([100] * 5)
    assert host.times == pytest.approx([70] + [100] * 6)
