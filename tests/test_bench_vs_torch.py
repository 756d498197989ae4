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
from senano_jax.interop.torch_program import apply_patches

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


def patched(best: bool, train_files: str = "/shards/*.bin", source: str = STAND_IN) -> str:
    return apply_patches(source, bench.patches(train_files, (1, 14), 20, best=best), "train_gpt.py")


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


ANCHORS = ("file_iter", "train_files", "num_iterations =", "if last_step", "x, v1 =", "window_size =")
ANCHOR_LINES = [i for i, line in enumerate(STAND_IN.splitlines()) if any(anchor in line for anchor in ANCHORS)]


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("line", ANCHOR_LINES)
def test_a_line_that_is_missing_or_double_stops_the_script(line, times):
    lines = STAND_IN.splitlines(keepends=True)
    with pytest.raises(UserError, match=f"found {times} times instead of once"):
        patched(best=True, source="".join([*lines[:line], lines[line] * times, *lines[line + 1 :]]))


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
    """A PyTorch checkout, a Python that claims PyTorch, nvidia-smi and a shard; returns the arguments."""
    repository = tmp_path / "torch repo"
    repository.mkdir()
    (repository / "train_gpt.py").write_text(STAND_IN)
    programs = {
        # -c CODE, or -m torch.distributed.run --standalone --nproc_per_node=1 train_gpt.py
        "torch-python": f'if [ "$1" = -c ]; then echo True; else exec {sys.executable} "$5"; fi',
        "nvidia-smi": 'echo "A GPU, 1.2.3"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
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
    assert "torch as shipped ms" in capsys.readouterr().out


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
        (["--json", "/nowhere/out.json"], "no folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line(machine, change, message):
    with pytest.raises(UserError, match=message) as error:
        bench.main([*machine, *change])
    assert "\n" not in str(error.value)
