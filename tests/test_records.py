"""The generated tables: which runs are records, what stands beside what, and that README.md is what the data say."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from written_runs import write_run

from senano_jax.errors import UserError
from senano_jax.model.build import abstract_params, count_parameters, make_model
from senano_jax.presets import PRESETS, preset
from senano_jax.runlog import published
from senano_jax.runlog.reader import read_log

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("records", ROOT / "scripts" / "records.py")
records = sys.modules["records"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(records)

KNOWN = json.loads(Path(published.__file__).with_name("records.json").read_text())


def cells(block: str) -> list[list[str]]:
    """The table of a block, without its first two lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"][2:]


def torch_log(logs, system, seed, losses):
    """Evaluated at steps 0, 5 and 10 of 10, or at fewer."""
    lines = [
        f"step:{step}/10 val_loss:{loss} train_time:{step}ms step_avg:1.00ms tokens:{step}000\n"
        for step, loss in zip((0, 5, 10), losses)
    ]
    (logs / f"torch-{system}-h200-200-steps-seed{seed}.txt").write_text("".join(lines))


def our_run(logs, system, seed, losses, tokens_per_step=1000):
    folder = logs / f"{system}-h100-200-steps-seed{seed}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"preset": system, "steps": 10, "seed": seed}))
    lines = [
        {"step": step, "tokens_trained": step * tokens_per_step, "val_loss": loss}
        for step, loss in zip((0, 5, 10), losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def both(tmp_path):
    """Two seeds of each program, 0.01 and 0.006 apart."""
    torch_log(tmp_path, "small", 0, (10.8, 5.1, 4.0))
    torch_log(tmp_path, "small", 1, (10.8, 5.3))
    our_run(tmp_path, "small", 0, (10.8, 5.2, 4.005))
    our_run(tmp_path, "small", 1, (10.8, 5.22, 4.007))
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/parity.md"])
def test_the_texts_are_what_the_data_say(name):
    text = (ROOT / name).read_text()
    assert records.fill(text, Path(name).name, ROOT / "logs") == text, "run python scripts/records.py"


@pytest.mark.parametrize("entry", [entry for entry in KNOWN if entry["preset"] in PRESETS], ids=lambda e: e["preset"])
def test_published_systems_have_the_parameters_and_tokens_of_their_presets(entry):
    config = preset(entry["preset"])
    assert entry["parameters"] == count_parameters(abstract_params(make_model(config.model, config.dtype)))
    assert entry["tokens"] == config.steps * config.batch_tokens


@pytest.mark.parametrize(("system", "loss"), [("recurrent", 3.58743), ("no-value-embeddings", 3.5914)])
def test_the_pytorch_runs_of_200_steps_are_there_to_compare_with(system, loss):
    """Of each system one seed to the end and one to step 175."""
    complete, cut = (
        read_log(ROOT / "logs" / f"torch-{system}-h200-200-steps-seed{seed}.txt") for seed in ("-default", "1234")
    )
    assert (complete.complete, cut.complete) == (True, False)
    assert [point.step for point in complete.points] == list(range(0, 201, 25))
    assert [point[:2] for point in cut.points] == [point[:2] for point in complete.points[:-1]]
    assert (complete.final.tokens, complete.final.val_loss) == (200 * 393_216, loss)
    assert len(complete.train_points) == 200 and complete.train_points[0].loss == 10.82584


def test_without_a_run_of_ours_the_block_says_so(tmp_path):
    block = records.records_block(tmp_path)
    assert records.NONE_YET in block
    assert [row[0] for row in cells(block)] == ["`llmc`", "`no-value-embeddings`", "`value-embeddings`", "`recurrent`"]


def test_a_run_that_keeps_the_rules_is_a_record(tmp_path):
    write_run(tmp_path / "new-record")
    block = records.records_block(tmp_path)
    assert records.NONE_YET not in block
    assert cells(block)[-1] == [
        "`demo`", "this program (JAX)", "6,632,527", "16,384", "3.2700", "8 x NVIDIA H100 80GB HBM3, 0:20:00",
        "[log](logs/new-record/)",
    ]  # fmt: skip


def test_other_hardware_does_not_keep_a_run_from_the_table(tmp_path):
    write_run(tmp_path / "slow", devices=("NVIDIA H200",), minutes=200)
    assert cells(records.records_block(tmp_path))[-1][5] == "1 x NVIDIA H200, 3:20:00"


@pytest.mark.parametrize("fault", ["loss", "incomplete", "order", "data", "damaged", "unnamed"])
def test_what_is_no_record(tmp_path, fault):
    options = {"loss": {"loss": 3.29}, "incomplete": {"steps": 3}, "order": {"changes": {2: {"tokens_read": 9000}}}}
    name = "recurrent-20261122-232845-0a1f" if fault == "unnamed" else "run"
    folder = write_run(tmp_path / name, **options.get(fault, {}))
    if fault == "data":
        (folder / "data.json").unlink()
    if fault == "damaged":
        (folder / "config.json").write_text("{")
    assert records.NONE_YET in records.records_block(tmp_path)


def test_programs_side_by_side(both):
    torch, jax, difference, p = cells(records.same_tokens_block(both))
    assert torch == ["`small`", "PyTorch", "2", "10,000", "5.2000 ± 0.1414", "4.0000 (n=1)"]
    assert jax == ["`small`", "JAX", "2", "10,000", "5.2100 ± 0.0141", "4.0060 ± 0.0014"]
    assert difference == ["`small`", "JAX - PyTorch", "", "", "+0.0100", "+0.0060"]
    # t = 0.01 / sqrt(0.0101) with 1.02 degrees of freedom; at the end PyTorch has one seed.
    assert p == ["`small`", "Welch's p", "", "", "0.94", "-"]
    assert "All differences are within 0.008 at step 10 and 0.05 before." in records.same_tokens_block(both)


@pytest.mark.parametrize(
    ("losses", "broken"), [((10.8, 5.2, 4.03), "small at step 10."), ((10.8, 5.04, 4.0), "small at step 5.")]
)
def test_a_difference_out_of_bounds_is_said(both, losses, broken):
    our_run(both, "small", 2, losses)
    torch_log(both, "small", 2, (10.8, 5.3, 4.0))
    assert f"Not within 0.008 at step 10 and 0.05 before: {broken}\n" in records.same_tokens_block(both)


def test_a_system_of_one_program_is_left_out(both):
    our_run(both, "other", 0, (10.8, 5.0, 4.0))
    assert {row[0] for row in cells(records.same_tokens_block(both))} == {"`small`"}


def test_without_both_programs_there_is_no_table(tmp_path):
    torch_log(tmp_path, "small", 0, (10.8, 5.1, 4.0))
    assert records.same_tokens_block(tmp_path) == ""


def test_steps_of_other_sizes_are_refused(both):
    our_run(both, "small", 2, (10.8, 5.0), tokens_per_step=2000)
    with pytest.raises(UserError, match=r"tokens at step 5, another run .* compare runs of one batch size"):
        records.same_tokens_block(both)


def test_check_changes_nothing_and_tells(both, monkeypatch, capsys):
    root, logs = both, both / "logs"
    logs.mkdir()
    readme = (ROOT / "README.md").read_text()
    outdated = re.sub(r"(?s)(<!-- records: .*?-->\n).*?(<!-- end)", r"\1old\n\2", readme)
    (root / "README.md").write_text(outdated)
    monkeypatch.setattr(sys, "argv", ["records.py", "--check", f"--root={root}"])
    with pytest.raises(SystemExit) as ended:
        records.main()
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {root / 'README.md'} differs from its data: run")
    assert (root / "README.md").read_text() == outdated
    monkeypatch.setattr(sys, "argv", ["records.py", f"--root={root}"])
    records.main()
    monkeypatch.setattr(sys, "argv", ["records.py", "--check", f"--root={root}"])
    records.main()
    assert "| `recurrent` |" in (root / "README.md").read_text()


def test_missing_markers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"README\.md has no line <!-- records: "):
        records.fill("# a text without them", "README.md", tmp_path)


DOCS = ("parity.md", "systems.md")
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_each_command_gives_the_figures_beside_it(path):
    text = path.read_text()
    assert records.fill_figures(text, ROOT) == text, "run python scripts/records.py"
    with_figures = sum(text[match.end() :].startswith(records.FIGURES[0]) for match in records.COMMAND.finditer(text))
    runnable = re.findall(r"python -m senano_jax\.compare (?!.*<)", text)
    assert len(runnable) == with_figures


def test_the_commands_are_of_the_runs_that_the_texts_speak_of():
    readme, parity, systems = (path.read_text() for path in (TEXTS[0], *(ROOT / "docs" / n for n in DOCS)))
    torch, jax = cells(figures_in(parity[parity.index("'logs/recurrent-*-200-steps-seed*'") :]))
    assert ("(n=3)" in torch[3], "(n=3)" in jax[3]) == (True, True)
    for row, side in zip((torch, jax), ("PyTorch", "JAX")):
        same_tokens = [line for line in parity.splitlines() if line.startswith(f"| `recurrent` | {side} |")][-1]
        assert row[3].split(" (")[0] in same_tokens
        assert f"{row[3].split(' (')[0]} ({side})" in " ".join(readme.split())
    final = {row[0]: row[3] for row in cells(figures_in(systems))}
    for name, loss in final.items():
        by_hand = [line for line in systems.splitlines() if line.startswith(f"| `{name}` |") and "MiB" in line]
        assert [f"| {loss}, after" in line for line in by_hand] == [True]


def figures_in(text: str) -> str:
    begin, end = records.FIGURES
    return text.partition(begin)[2].partition(end)[0]


def test_figures_are_renewed_and_their_absence_is_told(both):
    (both / "logs").mkdir()
    torch_log(both / "logs", "small", 0, (10.8, 5.1, 4.0))
    command = "    python -m senano_jax.compare \\\n        A='logs/torch-*' --target 4.5\n"
    begin, end = records.FIGURES
    # from 5,000 tokens at 5.1 to 10,000 at 4.0
    filled = records.fill_figures(f"before\n{command}{begin}old\n{end}\nafter", both)
    assert cells(filled) == [["A", "-", "10,000", "4.0000", "7,297", "first"]]
    assert filled.startswith(f"before\n{command}{begin}| run |") and filled.endswith(f"{end}\nafter")
    assert records.fill_figures(command, both) == command
    with pytest.raises(UserError, match="have no end"):
        records.fill_figures(f"{command}{begin}", both)
    with pytest.raises(UserError, match="matches no file"):
        records.fill_figures(f"{command.replace('torch-', 'jax-')}{begin}{end}", both)


def test_several_runs_in_one_log_are_seeds_and_diverged_ones_are_left_out(both):
    torch_log(both, "small", 2, (10.8, 5.5, 4.1))
    one = both / "torch-small-h200-200-steps-seed0.txt"
    one.write_text(one.read_text() + (both / "torch-small-h200-200-steps-seed2.txt").read_text())
    (both / "torch-small-h200-200-steps-seed2.txt").unlink()
    our_run(both, "small", 3, (10.8, float("nan")))
    block = records.same_tokens_block(both)
    torch, jax, *_ = cells(block)
    assert torch[4:] == ["5.3000 ± 0.2000", "4.0500 ± 0.0707 (n=2)"]
    assert jax[2] == "2"
    assert "Left out, because they diverged: small by JAX." in block
