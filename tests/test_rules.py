"""Each rule of the track on run folders that were written, not trained: kept, broken, and not to be known."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from written_runs import BATCH, H100, STEPS, TRAIN, VAL, fineweb, run_config, shard, write_run

from senano_jax.errors import UserError
from senano_jax.presets import demo, preset
from senano_jax.rules import Arguments, main
from senano_jax.runlog.run_folder import read_run_folder
from senano_jax.runlog.track_rules import check_rules, fineweb_rule, loss_rule, order_rule, parameter_rules, time_rule

RULES = ("rounded", "strict", "loss", "order", "fineweb", "time")


@pytest.fixture
def run(tmp_path):
    """Writes a run and reads it again."""
    return lambda **options: read_run_folder(write_run(tmp_path / "run", **options))


def test_a_run_that_keeps_all_rules(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main(Arguments(folder)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3.2700 after 16,384 tokens" in printed
    assert f"0:20:00 on 8 x {H100}" in printed
    assert main(Arguments(folder, json=True)) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert [rule["status"] for rule in rules] == ["pass"] * len(RULES)
    assert [rule["value"] for rule in rules[2:]] == [3.27, STEPS * BATCH, 3, 20 * 60_000]


@pytest.mark.parametrize(
    ("options", "status", "changed"),
    [
        ({"loss": 3.281}, 1, {"loss": "fail"}),
        ({"minutes": 30}, 1, {"time": "fail"}),
        ({"devices": ("NVIDIA H200",)}, 3, {"time": "not verifiable"}),
        ({"steps": 3}, 3, {"loss": "not verifiable", "order": "not verifiable", "time": "not verifiable"}),
        ({"devices": (), "loss": 3.3}, 1, {"loss": "fail", "time": "not verifiable"}),
        ({"loss": float("nan")}, 1, {"loss": "fail", "time": "not verifiable"}),
    ],
)
def test_the_exit_status_tells_the_worst(tmp_path, capsys, options, status, changed):
    folder = write_run(tmp_path / "run", **options)
    assert main(Arguments(folder)) == status
    found = dict(zip(RULES, (verdict.status for verdict in check_rules(folder))))
    assert found == dict.fromkeys(RULES, "pass") | changed


def test_the_parameters_of_a_program_s_own_model_are_not_known(run):
    """Whatever model config.json describes beside it."""
    config = dataclasses.replace(preset("recurrent"), own_model="Bigram 0123abcd")
    verdicts = parameter_rules(config, dataclasses.replace(run(), parameters=170_000_000))
    assert [verdict.status for verdict in verdicts] == ["not verifiable"] * 2
    assert verdicts[0].figure == (
        "a program's own model (Bigram 0123abcd), which the run folder does not hold; it says that there were "
        "170,000,000"
    )


def test_the_record_s_parameters_are_162m_rounded_and_too_many_strictly(run):
    rounded, strict = parameter_rules(preset("recurrent"), dataclasses.replace(run(), parameters=None))
    assert (rounded.status, rounded.figure) == ("pass", "162M")
    assert (strict.status, strict.value, strict.figure) == ("fail", 162_165_555, "162,165,555, 165,555 too many")


def test_every_row_of_embedding_and_head_counts(run):
    """1,128 more of the one and 1,152 of the other are too many by either reading."""
    config = preset("no-value-embeddings")
    model = dataclasses.replace(config.model, vocab_size=50_257 + 1_128, padded_vocab_size=50_304 + 1_152)
    rounded, strict = parameter_rules(
        dataclasses.replace(config, model=model), dataclasses.replace(run(), parameters=None)
    )
    assert strict.value == 162_165_546 + 768 * (1_128 + 1_152)
    assert (rounded.status, rounded.value, strict.status) == ("fail", 164_000_000, "fail")


def test_a_count_that_disagrees_with_the_run_s_own_is_not_verifiable(run):
    for verdict in parameter_rules(run_config(), dataclasses.replace(run(), parameters=161_000_000)):
        assert verdict.status == "not verifiable"
        assert "says that the run had 161,000,000" in verdict.figure


def test_a_loss_on_fewer_validation_tokens_is_no_proof(run):
    verdict = loss_rule(run_config(data=demo().data), run())
    assert verdict.status == "not verifiable"
    assert "on 32,768 validation tokens instead of 10,485,760" in verdict.figure


@pytest.mark.parametrize(
    ("changes", "status", "figure"),
    [
        ({2: {"tokens_read": 8_704}}, "fail", "8,704 tokens read and 8,192 trained on after step 2"),
        ({3: {"tokens_read": 8_192}}, "fail", "8,192 tokens read and 12,288 trained on after step 3"),
        ({3: {"tokens_trained": 8_192}}, "fail", "8,192 tokens trained on after step 3, not 12,288"),
        ({2: {"loss": None}}, "fail", "metrics.jsonl has no line for step 2"),
        ({4: {"tokens_read": None}}, "not verifiable", "metrics.jsonl has no tokens_read for step 4"),
    ],
)
def test_gaps_and_repetitions_are_found(run, changes, status, figure):
    verdict = order_rule(run_config(), run(changes=changes), fineweb())
    assert (verdict.status, verdict.figure) == (status, figure)


def test_skipped_tokens_break_the_order(run):
    data = dataclasses.replace(demo().data, discard_micro_batch=512)
    verdict = order_rule(run_config(data=data), run(), fineweb())
    assert (verdict.status, verdict.figure) == ("fail", "512 tokens are skipped after every step")


def test_weights_from_elsewhere_have_read_nobody_knows_what(run):
    verdict = order_rule(run_config(init_from="other.pt"), run(), fineweb())
    assert verdict.status == "not verifiable"
    assert "weights from other.pt" in verdict.figure


@pytest.mark.parametrize("copied", [TRAIN.format(1), VAL])
def test_one_content_under_two_names_is_read_twice(run, copied):
    data = fineweb()
    data["train"][1] = dataclasses.replace(data["train"][1], sha256=shard(copied).sha256)
    verdict = order_rule(run_config(), run(), data)
    assert verdict.status == "fail"
    assert verdict.figure.endswith("have the same content") and copied in verdict.figure


def test_without_a_record_of_the_data_only_the_order_is_known(run):
    assert order_rule(run_config(), run(), None).status == "pass"
    assert fineweb_rule(None).status == "not verifiable"


@pytest.mark.parametrize(
    ("changes", "status", "figure"),
    [
        ({"sha256": "0" * 64}, "fail", f"{TRAIN.format(2)} has SHA-256 {'0' * 64}, published is"),
        ({"sha256": None}, "not verifiable", f"before it had a checksum of {TRAIN.format(2)}"),
        ({"published_sha256": None}, "not verifiable", f"no published checksum of {TRAIN.format(2)} is known"),
        ({"published_url": "https://hub/other/x.bin"}, "not verifiable", "no published checksum of"),
        ({"name": TRAIN.format(3)}, "fail", f"train shards are {TRAIN.format(1)}, {TRAIN.format(3)} instead of"),
    ],
)
def test_what_is_not_known_to_be_fineweb(changes, status, figure):
    data = fineweb()
    data["train"][1] = dataclasses.replace(data["train"][1], **changes)
    verdict = fineweb_rule(data)
    assert verdict.status == status and figure in verdict.figure


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_shards_is_not_fineweb(part):
    assert fineweb_rule(fineweb() | {part: []}).status == "fail"


def test_other_hardware_is_scaled_in_so_many_words(run):
    verdict = time_rule(run_config(steps=8), run(minutes=16), ["NVIDIA H200"] * 2)
    assert (verdict.status, verdict.value) == ("not verifiable", None)
    assert verdict.figure == (
        "0:16:00 on 2 x NVIDIA H200 for 16,384 tokens (17 tokens/s, compilation included); NOT MEASURED, if speed grew "
        "with the number of devices: 0:08:00 on 8 x NVIDIA H200 for 32,768 tokens"
    )


@pytest.mark.parametrize("earlier", [[(H100,) * 4], [("NVIDIA H200",) * 8]])
def test_a_run_on_changing_hardware_was_not_timed_on_one(tmp_path, earlier):
    assert check_rules(write_run(tmp_path / "run", earlier=earlier))[-1].status == "not verifiable"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read .*; give the folder of a run"):
        main(Arguments(tmp_path))


def test_the_command_ends_with_the_status(tmp_path):
    folder = write_run(tmp_path / "run", loss=3.5)
    result = subprocess.run([sys.executable, "-m", "senano_jax.rules", folder], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert "3.5000 after 16,384 tokens" in result.stdout


def test_the_folder_may_be_in_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "run[1]")
    assert main(Arguments(Path("~/run[1]"))) == 0
    assert f"{tmp_path}/run[1]" in capsys.readouterr().out.replace("\n", "")


def test_a_diverged_run_breaks_the_rule_on_loss(run):
    verdict = loss_rule(run_config(), run(loss=float("nan")))
    assert (verdict.status, verdict.figure) == ("fail", f"diverged: the loss is no number from step {STEPS} on")
