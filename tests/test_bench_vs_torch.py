"""The comparison script: substitutions in a stand-in of the PyTorch file, step lines, medians, and whole runs of it."""

import importlib.util
import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from senano_jax.data.shards import write_shard
from senano_jax.errors import UserError
from senano_jax.interop.torch_program import apply_patches, batch, launch_command

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_vs_torch.py"
_spec = importlib.util.spec_from_file_location("bench_vs_torch", SCRIPT)
bench = sys.modules["bench_vs_torch"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

# Lines that the substitutions look for, around a program that prints step times of 100 ms a block of the window, plus
# 1 ms a step.
STAND_IN = textwrap.dedent(
    """
    class Attention:
        def forward(self):
            return attend(
                scale=0.12,
                kernel_options={
                    "BLOCK_M": 64,
                    "BLOCK_N": 64,
                }
            )
    class Model:
        def forward(self, x, v1, x0, block_mask):
            x, v1 = checkpoint(self.blocks[0], x, v1, x0, block_mask)
            # x, v1 = self.blocks[0](x, v1, x0, block_mask)
    def load():
        file_iter = iter(files)
    class args:
        train_files = "data/train_*.bin" # input
        train_seq_len = 48*1024 // 2
        grad_accum_steps_per_device = 16
        num_iterations = 1700  # steps
        val_loss_every = 125
    def validate(last_step, step):
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            raise SystemExit("validation ran")
    validate(True, 0)
    elapsed = 0
    def get_window_size_blocks(step):
        x = step / args.num_iterations
        window_size = 128 * max(1, round(14 * x))
        return window_size // 128
    for step in range(args.num_iterations):
        elapsed += 100 * get_window_size_blocks(step) + step
        print(f"step:{step+1}/{args.num_iterations} train_time:{elapsed}ms step_avg:{elapsed/(step + 1):.2f}ms")
    """
)


def patched(best: bool, train_files: str = "/shards/*.bin", source: str = STAND_IN, split=()) -> str:
    return apply_patches(source, bench.patches(train_files, (1, 14), 20, best=best, split=split), "train_gpt.py")


def test_a_run_says_what_it_found_before_the_next_one_begins():
    steps = tuple(bench.StepTime(window, ms) for window, ms in [(1, 5), (1, 7), (1, 6), (14, 1234.5)])
    run = bench.Run(bench.OURS, 1, 9.0, steps)
    assert bench.medians(run) == "6.0 ms at a window of 1, 1,234.5 ms at 14"


def test_as_shipped_changes_only_files_steps_windows_validation_and_loader():
    changed = [
        (old.strip(), new.strip())
        for old, new in zip(STAND_IN.splitlines(), patched(best=False).splitlines(), strict=True)
        if old != new
    ]
    assert changed == [
        ("file_iter = iter(files)", 'file_iter = __import__("itertools").cycle(files)'),
        ('train_files = "data/train_*.bin" # input', "train_files = '/shards/*.bin'"),
        ("num_iterations = 1700  # steps", "num_iterations = 40"),
        (
            "if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):",
            "if False and (args.val_loss_every > 0 and step % args.val_loss_every == 0):",
        ),
        ("window_size = 128 * max(1, round(14 * x))", "window_size = 128 * (1, 14)[min(step // 20, 1)]"),
    ]


def test_best_calls_the_block_directly_with_default_kernel_options():
    source = patched(best=True)
    assert "\n        x, v1 = self.blocks[0](x, v1, x0, block_mask)\n" in source
    assert "\n        # x, v1 = checkpoint(self.blocks[0], x, v1, x0, block_mask)\n" in source
    assert "kernel_options" not in source and "BLOCK_N" not in source
    compile(source, "train_gpt.py", "exec")


def test_file_names_survive_quotes_and_backslashes():
    name = r"/a \1 'b' \"c\"/*.bin"
    assert f"train_files = {name!r}\n" in patched(best=False, train_files=name)


@pytest.mark.parametrize(
    ("split", "seq_len", "micro_batches"),
    [
        (batch(1, 16, 24_576), "48*1024 // 2", "16"),
        (batch(4, 16, 24_576), "24576", "4"),
        (batch(16, 16, 24_576), "24576", "1"),
        (batch(1, 8, 16_384), "16384", "8"),
        (batch(8, 8, 16_384), "16384", "1"),
    ],
)
def test_a_step_holds_the_same_tokens_on_any_number_of_gpus(split, seq_len, micro_batches):
    """On one GPU the record's batch is the file's own."""
    source = patched(best=True, split=split)
    assert f"\n    train_seq_len = {seq_len}\n" in source
    assert f"\n    grad_accum_steps_per_device = {micro_batches}\n" in source


@pytest.mark.parametrize(
    ("gpus", "sequences", "use"),
    [(3, 16, "1, 2, 4, 8 or 16"), (32, 16, "1, 2, 4, 8 or 16"), (2, 5, "1 or 5"), (2, 1, "1")],
)
def test_gpus_that_cannot_have_equal_shares_are_told_what_could(gpus, sequences, use):
    with pytest.raises(UserError, match=f"--gpus {gpus}: a step has {sequences} sequences .*; use {use}$"):
        batch(gpus, sequences, 24_576)


def test_there_is_a_process_for_each_gpu():
    assert launch_command("python3", 4) == [
        *("python3", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "train_gpt.py"),
    ]


ANCHORS = (
    "file_iter",
    "train_files",
    "train_seq_len",
    "grad_accum",
    "num_iterations =",
    "if last_step",
    "x, v1 =",
    "window_size =",
)
ANCHOR_LINES = [i for i, line in enumerate(STAND_IN.splitlines()) if any(anchor in line for anchor in ANCHORS)]


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("line", ANCHOR_LINES)
def test_a_line_that_is_missing_or_double_stops_the_script(line, times):
    lines = STAND_IN.splitlines(keepends=True)
    with pytest.raises(UserError, match=f"found {times} times instead of once"):
        patched(
            best=True,
            source="".join([*lines[:line], lines[line] * times, *lines[line + 1 :]]),
            split=batch(2, 16, 24_576),
        )


def test_step_times_are_differences_of_consecutive_lines():
    log = """a program that prints f"step:{step}/{total} train_time:{ms}ms"
step:0/40 val_loss:10.8258 train_time:0ms step_avg:0.00ms tokens:0.00M
step:1/40 train_time:84000ms step_avg:84000.00ms
step:2/40 train_time:85900ms step_avg:42950.00ms
step:2/40 train_time:85900ms step_avg:42950.00ms
step:3/40 train_time:87801ms step_avg:29267.00ms
"""
    assert bench.parse_torch_log(log) == [84000, 1900, 1901]


def test_our_step_times_come_from_the_report_of_the_profile():
    def speed(window, *times):
        return {"window_blocks": window, "step_ms": {"median": 0, "times": times}}

    report = {"speed": speed(1, 5.5, 6.5), "sweep": [speed(14, 8.0)]}
    assert [(t.window, t.ms) for t in bench.parse_report(report)] == [(1, 5.5), (1, 6.5), (14, 8.0)]


def test_medians_by_window_over_all_rounds():
    def run(program, round_, *ms):
        return bench.Run(program, round_, 1.0, tuple(bench.StepTime(1 + i // 2, t) for i, t in enumerate(ms)))

    runs = [
        run(bench.SHIPPED, 1, 200, 220, 400),
        run(bench.SHIPPED, 2, 210, 230, 400),
        run(bench.OURS, 1, 100, 110, 200),
    ]
    first, second = bench.tabulate(runs, tokens_per_step=1000)
    assert first.n == {bench.SHIPPED: 4, bench.OURS: 2}
    assert first.ms == {bench.SHIPPED: 215, bench.OURS: 105}
    assert first.tokens_per_s[bench.OURS] == pytest.approx(1000 / 0.105)
    assert first.ours_faster_by == {bench.SHIPPED: pytest.approx(215 / 105)}
    assert (second.window, second.ours_faster_by) == (2, {bench.SHIPPED: 2.0})

    table = bench.format_rows([first, second], [bench.SHIPPED, bench.OURS]).splitlines()
    assert len({len(line) for line in table}) == 1 and len(table) == 3
    assert table[2].split() == ["2", "400.0", "2,500", "2", "200.0", "5,000", "1", "2.00x"]


def test_a_program_without_steps_at_a_window_has_dashes():
    rows = bench.tabulate([bench.Run(bench.SHIPPED, 1, 1.0, (bench.StepTime(1, 10.0),))], 1000)
    assert bench.format_rows(rows, [bench.SHIPPED, bench.OURS]).splitlines()[1].split()[-4:] == ["-"] * 4


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A PyTorch checkout, a Python that claims PyTorch, nvidia-smi of four GPUs, and a shard; returns the arguments."""
    repository = tmp_path / "torch repo"
    repository.mkdir()
    (repository / "train_gpt.py").write_text(STAND_IN)
    programs = {
        # -c CODE, or -m torch.distributed.run --standalone --nproc_per_node=GPUS train_gpt.py
        "torch-python": f'if [ "$1" = -c ]; then echo True; else echo "$4" >> {tmp_path}/processes; '
        f'cp "$5" {tmp_path}; exec {sys.executable} "$5"; fi',
        "nvidia-smi": 'for gpu in 1 2 3 4; do echo "A GPU, 1.2.3"; done',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_shard(tmp_path / "train.bin", np.zeros(60_000, np.int64))
    return [
        *("--torch-repo", str(repository), "--torch-python", str(tmp_path / "torch-python")),
        *("--train-files", str(tmp_path / "train.bin"), "--variants", "shipped", "best"),
    ]


def test_both_variants_run_by_turns(machine, tmp_path, capsys):
    flags = ["--windows", "2", "5", "--steps", "4", "--warmup", "1", "--rounds", "2"]
    bench.main([*machine, *flags, "--json", str(tmp_path / "out.json")])
    document = json.loads((tmp_path / "out.json").read_text())
    assert [(run["program"], run["round"]) for run in document["runs"]] == [
        (bench.SHIPPED, 1),
        (bench.BEST, 1),
        (bench.SHIPPED, 2),
        (bench.BEST, 2),
    ]
    steps = [(step["window"], step["ms"]) for step in document["runs"][0]["steps"]]
    assert steps == [*((2, 200 + i) for i in (1, 2, 3)), *((5, 500 + i) for i in (5, 6, 7))]
    assert document["environment"]["gpu"] == "A GPU" and document["environment"]["driver"] == "1.2.3"
    printed = capsys.readouterr().out
    assert "torch as shipped ms" in printed and "GPUs" not in printed
    assert (tmp_path / "processes").read_text() == 4 * "--nproc_per_node=1\n"


def test_both_programs_share_a_step_among_all_gpus(machine, tmp_path, monkeypatch, capsys):
    """The stand-in takes 300 ms a step whatever the GPUs; tokens/s are those of the whole step."""
    output_of, commands = bench.output_of, []

    def without_jax(command, folder, what):
        if what != bench.OURS:
            return output_of(command, folder, what)
        commands.append(command)
        speed = {"window_blocks": 3, "step_ms": {"times": [100.0]}}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"report": {"speed": speed, "sweep": []}}))
        return ""

    monkeypatch.setattr(bench, "output_of", without_jax)
    flags = ["--gpus", "2", "--batch-tokens", "131072", "--seq-len", "16384", "--windows", "3", "--steps", "4"]
    bench.main([*machine, *flags, "--variants", "best", "ours", "--json", str(tmp_path / "out.json")])
    assert (tmp_path / "processes").read_text() == "--nproc_per_node=2\n"
    source = (tmp_path / "train_gpt.py").read_text()
    assert "train_seq_len = 16384\n" in source and "grad_accum_steps_per_device = 4\n" in source
    (command,) = commands
    assert "--devices 2 --batch-tokens 131072 --seq-len 16384 --window-blocks 3" in " ".join(command)
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["gpus"], document["tokens_per_step"], document["tokens_per_sequence"]) == (2, 131_072, 16_384)
    assert document["environment"]["gpu"] == "2 x A GPU"
    assert document["windows"][0]["tokens_per_s"][bench.OURS] == pytest.approx(1_310_720)
    assert "\n2 GPUs, tokens/s of all of them together\n" in capsys.readouterr().out


def test_gpus_that_are_hidden_do_not_count(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match="--gpus 2: this machine has 1 that may be used"):
        bench.main([*machine, "--gpus", "2", "--seq-len", "1024"])


def test_a_failing_program_shows_its_last_lines(machine, tmp_path):
    (tmp_path / "torch repo" / "train_gpt.py").write_text(STAND_IN + 'raise SystemExit("out of memory")\n')
    with pytest.raises(UserError, match=r"(?s)torch as shipped failed with status 1.*step:8/8.*out of memory"):
        bench.main([*machine, "--steps", "4", "--windows", "1", "2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train-files", "/nowhere/*.bin"], "no shard matches"),
        (["--torch-repo", "/nowhere"], "is missing"),
        (["--torch-python", "/bin/false"], "no PyTorch that sees a GPU"),
        (["--windows", "3", "3"], "different numbers"),
        (["--steps", "2"], "more --steps"),
        (["--gpus", "8", "--seq-len", "1024"], "--gpus 8: this machine has 4 that may be used; choose fewer"),
        (["--gpus", "2"], "less than 3 sequences of 24576 tokens"),
        (["--gpus", "3"], "use 1, 2, 4, 8 or 16"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--seq-len", "1000"], "--seq-len 1000: give a batch of whole sequences"),
        (["--batch-tokens", "131072"], "--batch-tokens 131072, --seq-len 24576: give a batch of whole sequences"),
        (["--json", "/nowhere/out.json"], "no folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line(machine, change, message):
    with pytest.raises(UserError, match=message) as error:
        bench.main([*machine, *change])
    assert "\n" not in str(error.value)
