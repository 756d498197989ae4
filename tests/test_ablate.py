"""Ablations: a queue that nothing costs a run, studies that are refused before a device is rented, and a table whose
every figure is worked out by hand here."""

import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from written_runs import BATCH, PARAMETERS, write_run

from senano_jax.config import Stage, changed
from senano_jax.config_file import write_config
from senano_jax.data import sample
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.presets import preset
from senano_jax.runlog.statistics import Sample
from senano_jax.training.loop import train

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from ablation import cost, report, results, runner, runs, shards  # noqa: E402
from ablation.study import read_study  # noqa: E402

TIMES = ("step_ms", "tokens_per_s", "train_time_ms")
LIMIT_S = 300  # of a queue on a machine that other work shares

TINY = f"""
name = "tiny"
preset = "demo"
tokens = 5120
seeds = [0, 1]

[common]
batch_tokens = 128
seq_len = 128
final_window_tokens = 128
val_every = 15
checkpoint_every = 5
data = {{ train_files = "{sample.TRAIN}", val_files = "{sample.VAL}", val_tokens = 512, val_seq_len = 256 }}
model = {{ dim = 16, layers.loop = 0, layers.visits = 0 }}

[[variants]]
name = "base"

[[variants]]
name = "slow"
optimizer.matrices.rate = 0.01
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study whose runs of 40 steps take seconds."""
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def ablate():
    """Starts the command."""
    processes = []

    def start(*arguments):
        command = [sys.executable, str(SCRIPTS / "ablate.py"), *map(str, arguments)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def output_of(process):
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


def until(condition, process):
    """What `condition` returns once it is true, while the process runs."""
    while not (value := condition()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    return value


def process_of(queue, name):
    """The child of the queue that writes the output of this run."""
    for pid in Path(f"/proc/{queue.pid}/task/{queue.pid}/children").read_text().split():
        if os.readlink(f"/proc/{pid}/fd/1").endswith(f"/{name}.txt"):
            return int(pid)
    return None


def saved_but_not_finished(root, names):
    """One of these runs that has a checkpoint and is far from its end."""
    for name in names:
        steps = [int(path.name) for path in (root / name / "checkpoints").glob("*") if path.name.isdigit()]
        if steps and max(steps) < 25:
            return name
    return None


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


NAMES = ("base-seed0", "slow-seed0", "base-seed1", "slow-seed1")


def test_neither_a_killed_job_nor_a_killed_queue_costs_a_run(tiny, tmp_path, ablate):
    """A job is killed, then the queue; the next queue keeps what is finished and resumes the rest, and the losses are
    those of runs that nothing disturbed, bit for bit."""
    root, jobs = tmp_path / "tiny", {job.name: job for job in read_study(tiny).jobs}
    queue = ablate("run", tiny, "--gpus", 2, "--out", tmp_path)
    killed = until(lambda: saved_but_not_finished(root, NAMES), queue)
    os.kill(process_of(queue, killed), signal.SIGKILL)
    until(lambda: runs.finished_run(root, jobs["base-seed0"]) and saved_but_not_finished(root, NAMES[2:]), queue)
    queue.kill()
    output = queue.communicate()[0]
    assert f"{killed}: killed by signal 9, to be started again" in output
    assert f"{killed}: goes on" in output
    done = [name for name, job in jobs.items() if runs.finished_run(root, job)]
    assert 0 < len(done) < 4
    before = {name: times_of(root / name) for name in done}

    status, output = output_of(ablate("run", tiny, "--gpus", 2, "--out", tmp_path))
    assert status == 0, output
    assert "4 of 4 runs finished" in output
    assert {name: times_of(root / name) for name in done} == before
    resumed = [name for name in jobs if f"{name}: goes on" in output]
    assert resumed
    assert not set(resumed) & set(done)
    for name in {killed, resumed[-1]}:
        undisturbed = {"run_dir": str(tmp_path / name), "devices": 1, "checkpoint_every": 0}
        train(changed(jobs[name].config, undisturbed), "demo")
        assert records(root / name) == records(tmp_path / name)
    final = {name: records(root / name)[-1]["val_loss"] for name in jobs}
    assert len(set(final.values())) == 4
    assert not list(root.glob("*/checkpoints"))
    environment = json.loads((root / "slow-seed1" / "environment.json").read_text())
    assert environment["command"].startswith(f"python {SCRIPTS / 'ablate.py'} run {tiny}")
    status, output = output_of(ablate("status", tiny, "--out", tmp_path))
    assert status == 0
    assert output.count("finished") == 4
    assert f"loss {final['slow-seed1']:.4f}" in output


def test_a_failed_job_is_recorded_and_keeps_no_other_from_running(tmp_path, ablate):
    """One diverges and one lacks a file; neither is tried again unasked, and then with its reason forgotten."""
    path = tmp_path / "bad.toml"
    path.write_text(
        TINY.replace("tokens = 5120", "tokens = 512").replace("seeds = [0, 1]", "seeds = [3]")
        + 'init_from = "nowhere.pt"\n[[variants]]\nname = "wild"\noptimizer.matrices.rate = 1e38\n'
    )
    status, output = output_of(ablate("run", path, "--gpus", 2, "--out", tmp_path))
    assert status == 1, output
    root, (base, slow, wild) = tmp_path / "tiny", read_study(path).jobs
    assert runs.finished_run(root, base)
    assert "nowhere.pt" in runs.failure(root, slow)
    assert "loss nan" in runs.failure(root, wild) or "loss inf" in runs.failure(root, wild)
    assert "1 of 3 runs finished, 2 failed" in output
    status, output = output_of(ablate("run", path, "--out", tmp_path))
    assert status == 0
    assert "started" not in output
    rows = {
        cells[0]: cells for cells in report.table(read_study(path), results.read_results(read_study(path), root)).rows
    }
    assert rows["`wild`"][4:] == ("failed", "-", "-", "-", "")


def test_a_time_limit_ends_the_queue_with_the_way_on(tiny, tmp_path, ablate):
    status, output = output_of(ablate("run", tiny, "--time-limit", 1, "--only", "slow", "--out", tmp_path))
    assert status == 0
    assert "time limit: 0 of 2 runs finished, 2 left; go on with: python scripts/ablate.py run" in output


def test_two_queues_are_kept_out_of_one_folder(tmp_path):
    with runner.locked(tmp_path / "study"):
        with pytest.raises(UserError, match="in use by another queue"), runner.locked(tmp_path / "study"):
            pass
        with runner.locked(tmp_path / "another"):
            pass
    with runner.locked(tmp_path / "study"):
        pass


def test_devices_are_the_gpus_that_may_be_used_or_shares_of_the_cpu(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e1f")
    assert [place.environment for place in runner.devices(None)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "GPU-5e1f"},
    ]
    assert [place.name for place in runner.devices(1)] == ["GPU 2"]
    with pytest.raises(UserError, match="--gpus 3: this machine has 2 GPUs"):
        runner.devices(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [place.platform for place in runner.devices(3)] == ["cpu"] * 3


def test_the_longest_job_is_first_and_of_equals_each_first_seed(tmp_path):
    path = tmp_path / "order.toml"
    path.write_text(
        TINY.replace("seeds = [0, 1]", "seeds = [7, 1]\nbudgets = [1280, 51200]")
        + '[[variants]]\nname = "deep"\nmodel.layers.prelude = 5\nmodel.layers.coda = 5\nmodel.dim = 64\n'
    )
    study = read_study(path)
    queue = runner.Queue(study, tmp_path, study.jobs, [], None, print)
    assert [job.name for job in queue._left] == [
        "base-51200-seed7", "base-51200-seed1", "deep-seed7", "deep-seed1",
        "base-seed7", "slow-seed7", "base-seed1", "slow-seed1", "base-1280-seed7", "base-1280-seed1",
    ]  # fmt: skip


# Studies


def changed_study(tmp_path, *replacements):
    text, path = TINY, tmp_path / "study.toml"
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def test_a_variant_is_its_preset_then_the_common_then_its_own_differences(tmp_path):
    path = changed_study(
        tmp_path,
        (
            "optimizer.matrices.rate = 0.01",
            """"optimizer.matrices.rate" = 1
[[variants]]
name = "both"
from = "slow"
preset = "recurrent"
model.dim = 24
model.remat = "full"
seq_len = 256
batch_tokens = 256
micro_batches = "None"
dtype = "float32"
optimizer = { head.rate = 0.5, embeddings = "None" }
""",
        ),
    )
    study = read_study(path)
    base, slow, both = (study.job(name, 1).config for name in ("base", "slow", "both"))
    assert (base.steps, slow.steps, both.steps) == (40, 40, 20)
    assert base == changed(slow, {"optimizer.matrices.rate": 0.05})
    assert isinstance(slow.optimizer.matrices.rate, float)
    assert (both.optimizer.matrices.rate, both.optimizer.head.rate, both.optimizer.embeddings) == (1.0, 0.5, None)
    assert (both.model.num_heads, both.model.dim, both.model.remat) == (6, 24, "full")  # the preset's, own, own
    assert (both.model.layers.loop, both.seed, both.micro_batches) == (0, 1, None)
    assert [job.name for job in study.jobs][-1] == "both-seed1"
    assert study.variants[2].text.startswith("from slow; preset recurrent; model.dim = 24; model.remat = full; seq_len")


def test_stages_are_a_difference_like_any_other(tmp_path):
    stages = "stages = [{ part = 1 }, { part = 3, batch_tokens = 256, rate = 0.7, ahead = [[1, 1], [0.5, 0.0]] }]"
    study = read_study(changed_study(tmp_path, ("optimizer.matrices.rate = 0.01", stages), ("5120", "7168")))
    config = study.job("slow", 0).config
    assert config.stages == (Stage(1.0), Stage(3.0, batch_tokens=256, rate=0.7, ahead=((1.0, 1.0), (0.5, 0.0))))
    assert (config.steps, study.job("base", 0).config.steps) == (32, 56)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("matrices.rate", "matrices.raet", r"MuonRule has no field optimizer.matrices.raet; did you mean .*rate\?"),
        ("optimizer.matrices.rate", "nonsense", r"variant 'slow': Config has no field nonsense; it has model, data,"),
        ("rate = 0.01", "rate.deep = 0.01", r"optimizer.matrices.rate is .*deep.*; it takes float"),
        ("rate = 0.01", 'rate = "high"', r"variant 'slow': optimizer.matrices.rate is 'high'; it takes float"),
        ("rate = 0.01", "rate = true", r"optimizer.matrices.rate is 'True'; it takes float"),
        ("seq_len = 128", "seq_len = 128.0", r"variant 'base': seq_len is '128.0'; it takes int"),
        ("seq_len = 128", "seq_len = 100", r"variant 'base': --seq-len 100 is not a multiple of 128"),
        ("optimizer.matrices.rate = 0.01", 'dtype = "int8"', r"dtype is 'int8'; it takes .*bfloat16"),
        ("optimizer.matrices.rate = 0.01", "seed = 3", r"seed cannot be a difference: seeds decides it"),
        ("optimizer.matrices.rate = 0.01", "steps = 3", r"steps cannot be a difference: tokens decides it"),
        ("optimizer.matrices.rate = 0.01", "data.val_tokens = 256", r"data.val_tokens is 256, that of the base 512"),
        ("optimizer.matrices.rate = 0.01", "", r"variant 'slow' computes the same as 'base'"),
        ("optimizer.matrices.rate = 0.01", 'preset = "gpt5"', r"variant 'slow': unknown preset 'gpt5'; choose one of"),
        ('preset = "demo"', 'preset = "gpt5"', r"variant 'base': unknown preset 'gpt5'"),
        ("tokens = 5120", "tokens = 5200", r"5,200 tokens is no whole .* steps; near it 5,120 and 5,248"),
        ("seeds = [0, 1]", "seeds = [0]\nbudgets = [100]", r"variant 'base': a budget of 100 tokens .* near it 128$"),
        ("tokens = 5120", "tokens = -1", r"tokens has -1; it takes whole numbers from 1"),
        ("tokens = 5120", "tokens = 5120.5", r"tokens is 5120.5; it takes int"),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]", r"seeds has 0 twice"),
        ("seeds = [0, 1]", "seeds = []", r"seeds is empty"),
        ("seeds = [0, 1]", 'seeds = ["a"]', r"seeds has 'a'; it takes whole numbers from 0"),
        ("seeds = [0, 1]", "seed = 0", r"unknown key 'seed'; known are name, preset, tokens, seeds, variants"),
        ("seeds = [0, 1]", "", r"seeds is missing"),
        ('name = "slow"', 'name = "base"', r"two variants are called 'base'"),
        ('name = "slow"', "", r"variant 2 has no name"),
        ('name = "slow"', 'name = "../slow"', r"the name of variant 2 is '../slow'; use letters"),
        ('name = "slow"', 'name = "slow"\nfrom = "fast"', r"'slow': from is 'fast'; the variants are base, slow"),
        ('name = "slow"', 'name = "slow"\nfrom = "slow"', r"variant 'slow': from leads back to 'slow'"),
        ('name = "tiny"', 'name = "tiny', r"study.toml is not TOML: "),
    ],
)  # fmt: skip
def test_a_bad_study_is_refused_in_one_line(tmp_path, old, new, said):
    path = changed_study(tmp_path, (old, new))
    with pytest.raises(UserError, match=said) as caught:
        read_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_runs_never_share_a_folder(tmp_path):
    budgets, clash = ("seeds = [0, 1]", "seeds = [0]\nbudgets = [3840]"), ('"slow"', '"base-3840"')
    with pytest.raises(UserError, match="two runs would have the folder base-3840-seed0; give the variants other"):
        read_study(changed_study(tmp_path, budgets, clash))


def test_the_command_refuses_before_anything_starts(tiny, tmp_path, ablate):
    path = changed_study(tmp_path, ("rate = 0.01", "rate = []"))
    status, output = output_of(ablate("run", path, "--out", tmp_path / "out"))
    assert status == 2
    assert output.startswith(f"error: {path}, variant 'slow': optimizer.matrices.rate is '[]'")
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_steps_are_found_for_whatever_a_step_is_trained_on():
    config = preset("demo")
    assert cost.at_budget(config, 4096).steps == 1
    assert cost.at_budget(config, 7 * 4096).steps == 7
    ramp = changed(config, {"stages": (Stage(1), Stage(1, batch_tokens=8192), Stage(2, batch_tokens=4096, rate=0.5))})
    assert cost.at_budget(ramp, 10 * (4096 + 8192 + 2 * 4096)).steps == 40
    with pytest.raises(UserError, match=r"no whole number of steps; near it .* and "):
        cost.at_budget(ramp, 10 * (4096 + 8192 + 2 * 4096) + 1)
    assert cost.at_budget(changed(config, {"stages": (Stage(1, batch_tokens=8192), Stage(1))}), 4 * 12_288).steps == 8


def test_stages_count_with_their_tokens_and_their_model():
    """The second half of the steps has three times the tokens and twice the visits."""
    config = changed(preset("demo"), {"steps": 8, "initial_window_tokens": 512})
    deep = changed(config, {"model.layers.visits": 4})
    staged = changed(config, {"stages": (Stage(1), Stage(1, batch_tokens=3 * 4096, visits=4))})
    mean = (cost.flops_per_token(config) + 3 * cost.flops_per_token(deep)) / 4
    assert cost.flops_per_token(staged) == pytest.approx(mean, rel=1e-12)
    assert cost.training_flops(staged) == pytest.approx(mean * 16 * 4096, rel=1e-12)


def test_flops_of_a_token_are_those_worked_out_by_hand():
    """GPT-2 sees its whole sequence of 1,024 tokens, whatever is in it; a backward pass is two forward passes."""
    products = 12 * (4 + 8) * 768**2 + 768 * 50_304
    pairs_per_token = (1024 + 1) / 2
    by_hand = 3 * (2 * products + 12 * 4 * 768 * pairs_per_token)
    assert cost.flops_per_token(preset("llmc")) == pytest.approx(by_hand, rel=1e-12)


# Shards


def test_packed_shards_are_unpacked_once(tmp_path):
    packed, said = tmp_path / "packed", []
    packed.mkdir()
    for k in (1, 2):
        write_shard(tmp_path / "shard.bin", np.arange(40_000) % (k * 1000))
        (packed / f"train_{k}.bin.xz").write_bytes(lzma.compress((tmp_path / "shard.bin").read_bytes()))
    pattern = str(packed / "train_*.bin.xz")
    assert shards.unpacked(str(packed / "*.bin"), None, said.append) == str(packed / "*.bin")
    plain = shards.unpacked(pattern, tmp_path / "plain", said.append)
    assert plain == str(tmp_path / "plain" / "train_*.bin")
    assert said == [f"unpacked {tmp_path / 'plain' / f'train_{k}.bin'}" for k in (1, 2)]
    assert np.array_equal(open_shard(tmp_path / "plain" / "train_2.bin"), np.arange(40_000) % 2000)
    before = times_of(tmp_path / "plain")
    assert shards.unpacked(pattern, tmp_path / "plain", said.append) == plain
    assert times_of(tmp_path / "plain") == before
    assert shards.unpacked(pattern, None, said.append) == str(packed / "train_*.bin")
    (tmp_path / "plain" / "train_3.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_3.bin too, which .* does not hold"):
        shards.unpacked(pattern, tmp_path / "plain", said.append)


def test_damaged_packed_shards_and_strangers_are_refused(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9000))
    whole = (tmp_path / "a.bin").read_bytes()
    packed, into = tmp_path / "a.bin.xz", tmp_path / "plain"
    for content in (lzma.compress(whole)[:-20], b"no xz", lzma.compress(whole[:-2])):
        packed.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.bin"):
            shards.unpacked(str(packed), into, print)
        assert list(into.iterdir()) == []
    packed.write_bytes(lzma.compress(whole))
    (tmp_path / "a.bin").unlink()
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="is read-only; give --unpack-to another folder"):
        shards.unpacked(str(packed), None, print)
    tmp_path.chmod(0o755)
    assert not (tmp_path / "a.bin").exists()
    write_shard(into / "a.bin", np.arange(9000)[::-1])
    with pytest.raises(UserError, match=r"is not what .* holds; delete it"):
        shards.unpacked(str(packed), into, print)
    with pytest.raises(UserError, match="must lie in one folder"):
        shards.unpacked(str(tmp_path / "*" / "a.bin.xz"), into, print)


# Figures

WRITTEN = f"""
name = "written"
preset = "demo"
tokens = {4 * BATCH}
seeds = [0, 1, 2]
budgets = [{2 * BATCH}, {8 * BATCH}]

[[variants]]
name = "base"

[[variants]]
name = "better"
optimizer.matrices.rate = 0.06

[[variants]]
name = "same"
optimizer.matrices.rate = 0.07

[[variants]]
name = "alone"
optimizer.matrices.rate = 0.08

[[variants]]
name = "best"
model.layers.visits = 4

[[variants]]
name = "begun"
optimizer.matrices.rate = 0.09
"""
LOSSES = {
    ("base", 2): (4.40, 4.42, 4.38),
    ("base", 4): (4.00, 4.02, 3.98),
    ("base", 8): (3.80, 3.82, 3.78),
    ("better", 4): (3.90, 3.93, 3.87),
    ("same", 4): (4.01, 4.01, 3.983),
    ("alone", 4): (3.5,),
    ("best", 4): (3.6, 3.62, 3.58),
}
SPEEDS = {1: {"tokens_per_s": 7}, 2: {"tokens_per_s": 90}, 3: {"tokens_per_s": 500}, 4: {"tokens_per_s": 600}}


@pytest.fixture
def written(tmp_path):
    """A study and its folder: runs that were written, not trained."""
    path, root = tmp_path / "written.toml", tmp_path / "written"
    path.write_text(WRITTEN)
    root.mkdir()
    study = read_study(path)
    for (variant, steps), losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            job = study.job(variant, seed, steps * BATCH)
            folder = write_run(root / job.name, steps=steps, loss=loss, changes=SPEEDS)
            write_config(folder / "config.json", job.config, "demo", PARAMETERS)
    begun = write_run(root / "begun-seed0", steps=3)
    write_config(begun / "config.json", study.job("begun", 0).config, "demo", PARAMETERS)
    return study, root


def test_the_figures_are_those_worked_out_by_hand(written):
    found = results.read_results(*written)
    base, better, same, alone, best, begun = found.figures
    t_2 = 4.302652730  # Student's 97.5% point of 2 degrees of freedom
    assert base.losses == {0: 4.00, 1: 4.02, 2: 3.98}
    assert base.parameters == PARAMETERS
    assert base.tokens_per_s == 550  # of steps 3 and 4
    assert (base.difference, base.saved, base.verdict, base.lower) == (None, None, None, 0)

    assert better.difference.mean == pytest.approx(-0.10)
    assert better.difference.sd == pytest.approx(0.01)
    assert better.half_width == pytest.approx(t_2 * 0.01 / math.sqrt(3))
    assert (better.lower, better.difference.n, better.verdict) == (3, 3, "gain")
    # 3.90 lies half-way from 4.00 after 4 steps to 3.80 after 8, in the logarithm: at sqrt(4 x 8) steps.
    assert better.saved.tokens == pytest.approx((math.sqrt(32) - 4) * BATCH)
    assert (better.saved.bound, better.saved.seeds) == ("", 3)

    # Differences 0.010, -0.010 and 0.003; 4.001 lies 0.9975 of the way from 2 to 4 steps.
    assert same.difference.mean == pytest.approx(0.001)
    variance = (0.009**2 + 0.011**2 + 0.002**2) / 2
    assert same.half_width == pytest.approx(t_2 * math.sqrt(variance / 3))
    assert (same.lower, same.verdict) == (1, "within noise")
    assert same.saved.tokens == pytest.approx((2 * 2**0.9975 - 4) * BATCH)

    assert (alone.difference, alone.half_width, alone.lower) == (Sample(pytest.approx(-0.5), None, 1), None, 1)
    assert alone.verdict == "one pair"
    assert (alone.saved.tokens, alone.saved.bound, alone.saved.seeds) == (4 * BATCH, ">", 1)

    # Two applications of six layers' matrices become four: 6 applications in all become 10.
    ratio = (24 * 10 * 64**2 + 2 * 64 * 50_304) / (24 * 6 * 64**2 + 2 * 64 * 50_304)
    assert ratio < best.flops_ratio < ratio + 0.02  # attention's pairs are few beside a head of 50,304
    assert (best.verdict, best.saved.bound) == ("gain", ">")
    assert begun.losses == {}
    assert (begun.difference, begun.saved, begun.verdict) == (None, None, None)

    # Three variants with three pairs each; all differences of `best` are -0.4.
    assert found.noise.df == 6
    assert found.noise.sd == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * variance) / 6))
    assert found.remarks == ()
    assert found.hardware == ("8 x NVIDIA H100 80GB HBM3",)


def test_a_small_difference_is_no_gain_however_well_two_seeds_agree():
    agreeing, noise = Sample(-0.002, 0.00001, 2), results.Noise(0.003, 10)
    assert abs(agreeing.mean) > agreeing.half_width()
    assert results.judge(agreeing, noise) == "within noise"
    assert results.judge(Sample(-0.02, 0.00001, 2), noise) == "gain"
    assert results.judge(Sample(0.02, 0.00001, 2), noise) == "loss"
    assert results.judge(Sample(-0.02, 0.01, 2), noise) == "within noise"  # its own spread
    assert results.judge(Sample(-0.02, None, 1), noise) == "one pair"


def test_the_table_and_its_json(written):
    study, root = written
    runner.write_atomically(runs.failure_file(root, study.job("begun", 1)), b"error: it has loss nan\n")
    found = results.read_results(study, root)
    rows = {cells[0]: cells[1:] for cells in report.table(study, found).rows}
    assert rows["`base`"] == (f"{PARAMETERS:,}", "x 1.000", "550", "4.0000", "4.0200", "3.9800", *("base",) * 3, "")
    assert rows["`better`"][2:] == (
        "550", "3.9000", "3.9300", "3.8700", "-0.1000 ± 0.0248", "3 of 3", "+6,786 (+29.3%, 3 seeds)", "gain"
    )  # fmt: skip
    assert rows["`alone`"][3:] == ("3.5000", "-", "-", "-0.5000", "1 of 1", "> +16,384 (+50.0%, 1 seed)", "one pair")
    assert rows["`begun`"] == ("-", "-", "-", "-", "failed", "-", "-", "-", "-", "")
    block = report.markdown_block(study, found)
    assert "| `better` | 6,632,527 | x 1.000 | 550 |" in block
    assert "* `best`: model.layers.visits = 4\n" in block
    assert "One pair of seeds has no interval" in block
    assert "(3 seeds): 4.4000 after 8,192, 4.0000 after 16,384, 3.8000 after 32,768." in block
    document = json.loads(report.to_json(study, found))
    assert document["figures"][1]["losses"] == {"0": 3.9, "1": 3.93, "2": 3.87}
    assert document["figures"][5]["failures"] == {"1": "error: it has loss nan"}


def test_a_run_of_another_configuration_or_on_other_shards_is_noticed(written):
    study, root = written
    data = root / "same-seed1" / "data.json"
    document = json.loads(data.read_text())
    document["train"][1]["sha256"] = "0" * 64
    data.write_text(json.dumps(document))
    assert results.read_results(study, root).remarks == ("same-seed1: its train shard 2 is not that of the first run",)
    write_config(root / "better-seed2" / "config.json", study.job("same", 2).config, "demo", PARAMETERS)
    with pytest.raises(UserError, match=r"optimizer\.\S+ 0.07, the study says 0.06; give the variant another name"):
        results.read_results(study, root)


def test_the_writer_keeps_the_rest_of_the_document(written):
    study, root = written
    found = results.read_results(study, root)
    begin, end = "<!-- ablation written begin -->", "<!-- ablation written end -->"
    fresh = report.fill("# Title\n\nText.\n", study, found)
    assert fresh.startswith(f"# Title\n\nText.\n\n{begin}\nStudy `written`: 16,384 tokens a run")
    assert fresh.endswith(f"\n{end}\n")
    assert report.fill(fresh, study, found) == fresh
    around = f"before\n{begin}\nold\n{end}after <!-- ablation written2 begin -->"
    renewed = report.fill(around, study, found)
    assert renewed.startswith(f"before\n{begin}\n")
    assert renewed.endswith(f"\n{end}after <!-- ablation written2 begin -->")
    assert "old" not in renewed
    assert report.fill("", study, found).startswith(begin)
    for bad in (begin, end, f"{end} {begin}", f"{begin} {end} {begin} {end}"):
        with pytest.raises(UserError, match="must be there once each"):
            report.fill(bad, study, found)


def test_table_and_plot_write_what_they_are_asked_for(written, tmp_path, ablate):
    study, root = written
    document, figures, image = tmp_path / "page.md", tmp_path / "figures.json", tmp_path / "curves.svg"
    document.write_text("# Page\n")
    where = (study.path, "--out", root.parent)
    status, output = output_of(ablate("table", *where, "--write", document, "--json", figures))
    assert status == 0, output
    assert "within noise" in output
    assert document.read_text() == report.fill("# Page\n", study, results.read_results(study, root))
    assert json.loads(figures.read_text())["study"] == "written"
    status, output = output_of(ablate("plot", *where, "--image", image))
    assert status == 0, output
    assert "better" in image.read_text()
