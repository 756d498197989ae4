"""Studies are refused before a device is rented; their steps, their cost and their packed shards."""

import lzma

import numpy as np
import pytest
from ablate import chosen
from ablation import cost, shards
from ablation.study import read_study
from tiny_study import TINY, Command, changed_study, output_of, times_of

from senano_jax.config import Stage, changed
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.presets import preset


@pytest.fixture
def ablate():
    with Command() as command:
        yield command


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


def test_a_stage_may_be_short_of_a_step_at_the_preset_s_length(tmp_path):
    """The study's tokens decide: a two-hundredth of them is two steps, of the preset's steps less than one."""
    stages = "stages = [{ part = 1 }, { part = 199, rate = 0.7 }]"
    study = read_study(changed_study(tmp_path, ("optimizer.matrices.rate = 0.01", stages), ("5120", "51200")))
    assert study.job("slow", 0).config.steps == 400 > 200 > preset("demo").steps


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


def test_the_command_refuses_before_anything_starts(tmp_path, ablate):
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


def test_variants_and_single_runs_can_be_chosen(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace("seeds = [0, 1]", "seeds = [0, 1]\nbudgets = [2560]"))
    study = read_study(path)
    names = {only: [job.name for job in chosen(study, only)] for only in ("slow", "base-2560-seed1", "slow-seed0,base")}
    assert names == {
        "slow": ["slow-seed0", "slow-seed1"],
        "base-2560-seed1": ["base-2560-seed1"],
        "slow-seed0,base": ["base-2560-seed0", "base-2560-seed1", "base-seed0", "base-seed1", "slow-seed0"],
    }
    assert chosen(study, None) == list(study.jobs)
    with pytest.raises(UserError, match="--only base-seed2: the variants are base, slow; a run is called"):
        chosen(study, "base-seed2")
