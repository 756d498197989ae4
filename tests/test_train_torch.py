"""The script that trains the PyTorch file: what a stand-in of that file does after the substitutions."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from senano_jax.data.shards import write_shard
from senano_jax.errors import UserError
from senano_jax.interop.torch_program import apply_patches
from senano_jax.runlog.reader import read_log

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_torch.py"
_spec = importlib.util.spec_from_file_location("train_torch", SCRIPT)
script = sys.modules["train_torch"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

MICRO_BATCH_TOKENS = 24_576

# The lines that the substitutions look for. Shards are lists of numbers; a micro-batch of number n has a loss of n a
# token, so that the losses of the steps tell which micro-batches they were made from; each process adds its rank to it.
# Processes add up through files beside TOLD, and leave there the places of the micro-batches that they trained on.
STAND_IN = textwrap.dedent(
    """
    import glob, itertools, json, os, time
    told, trained_on = {}, []
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    master_process = rank == 0
    class torch:
        __version__ = "2.0"
        class cuda:
            get_device_name = staticmethod(lambda: "an H100")
        cat = staticmethod(lambda shards: sum(shards, []))
        manual_seed = staticmethod(lambda seed: told.update(seed=seed))
        load = staticmethod(lambda path: json.load(open(path)))
        def save(content, path):
            assert master_process
            json.dump(content, open(path, "w"))
    class Tensor:
        def __init__(self, value):
            self.value = value
        cpu = item = lambda self: self.value
        detach = lambda self: self
        backward = lambda self: None
        __add__ = __radd__ = lambda self, other: Tensor(self.value + getattr(other, "value", other))
    class dist:
        broadcast = staticmethod(lambda param, source: None)
        sums = itertools.count()
        def all_reduce(tensor):
            here = f"{os.environ['TOLD']}.sum{next(dist.sums)}"
            open(f"{here}.unfinished{rank}", "w").write(str(tensor.value))
            os.rename(f"{here}.unfinished{rank}", f"{here}.{rank}")
            everyone, end = [f"{here}.{other}" for other in range(world_size)], time.monotonic() + 60
            while not all(map(os.path.exists, everyone)):
                assert time.monotonic() < end, "a process is missing"
                time.sleep(0.005)
            tensor.value = sum(int(open(part).read()) for part in everyone)
    class nn:
        Module = object
    class Weights:
        detach = lambda self: self
    class GPT:
        layer_seq = None
        value = Tensor(3)
        def __init__(
            self, vocab_size):
            self.layer_seq = [0, 1, 1, 2]
        parameters = lambda self: [Weights()]
        state_dict = lambda self: {"w": self.value}
        def load_state_dict(self, arrays):
            self.value = Tensor(arrays["w"])
        def forward(self):
            attend(
                kernel_options={
                    "BLOCK_M": 64,
                }
            )
            x, v1 = checkpoint(self.blocks[0], x)
            # x, v1 = self.blocks[0](x)
        def __call__(self, inputs, targets, window):
            trained_on.append(targets)
            return Tensor(24576 * (inputs + rank))
    def _load_data_shard(file):
        told.setdefault("shards", []).append(os.path.basename(file))
        return [int(file.split("_")[-2])] * 40
    def generator(pattern):
        files = [file for file in sorted(glob.glob(pattern))]
        file_iter = iter(files)
    class Data:
        train_files = "data/train_*.bin" # input
        val_files = "data/val_*.bin" # input
        val_tokens = 10485760 # how many
        train_seq_len = 48*1024 // 2
        grad_accum_steps_per_device = 16 # of one
        num_iterations = 1700  # steps
        val_loss_every = 125  # steps
    args, console = Data(), True
    def print0(s, console):
        if master_process:
            print(s)
    print0(f"Running PyTorch {torch.__version__}", console=True)
    def get_window_size_blocks(step):
        return 1
    def loader(pattern):
        file_iter = iter(sorted(glob.glob(pattern)))
        yield from loaded(file_iter)
    def loaded(file_iter):
        tokens, pos = _load_data_shard(next(file_iter)), 0
        while pos < len(tokens):
            yield tokens[pos + rank], pos + rank
            pos += world_size
    model: nn.Module = GPT(
        vocab_size=50257)
    for param in model.parameters():
        dist.broadcast(param.detach(), 0)
    model: nn.Module = model
    train_loader = loader(args.train_files)
    train_steps = args.num_iterations
    for step in range(train_steps + 1):
        last_step = step == train_steps
        if last_step or step % args.val_loss_every == 0:
            val_loss = model.value.item() + 0.25
            print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{step}ms step_avg:1.00ms tokens:{step * 0.393216:.2f}M", console=True)
        if last_step:
            break
        # --------------- TRAINING SECTION -----------------
        inputs, targets = next(train_loader)
        for i in range(1, args.grad_accum_steps_per_device + 1):
            loss = model(inputs, targets, get_window_size_blocks(step))
            inputs, targets = next(train_loader)
            loss.backward()
        approx_training_time_ms = step + 1
        print0(f"step:{step+1}/{train_steps} train_time:{approx_training_time_ms:.0f}ms step_avg:{1:.2f}ms", console=True)
    told.update(schedule=model.layer_seq, files=args.val_files, tokens=args.val_tokens)
    if master_process:
        json.dump(told, open(os.environ["TOLD"], "w"))
    json.dump(trained_on, open(f"{os.environ['TOLD']}.{rank}", "w"))
    """  # noqa: E501
)

# -m torch.distributed.run --standalone --nproc_per_node=COUNT train_gpt.py
TORCHRUN = f"""#!/bin/sh
export WORLD_SIZE="${{4#--nproc_per_node=}}"
if [ "$WORLD_SIZE" = 1 ]; then exec {sys.executable} "$5"; fi
for rank in $(seq 0 $((WORLD_SIZE - 1))); do RANK=$rank {sys.executable} "$5" & started="$started $!"; done
for process in $started; do wait $process || failed=1; done
exit ${{failed:-0}}
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A checkout, a Python that claims PyTorch, 8 GPUs, and shards: 40 micro-batches each to the stand-in."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train_gpt.py").write_text(STAND_IN)
    for name, body in {"torch-python": TORCHRUN, "nvidia-smi": "#!/bin/sh\nseq 8\n"}.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        write_shard(tmp_path / "shards" / f"train_{number}_.bin", np.zeros(40 * MICRO_BATCH_TOKENS, np.int64))
    write_shard(tmp_path / "shards" / "val_0_.bin", np.zeros(8 * 131_072 + 2, np.int64))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    return [
        *("--torch-repo", f"{tmp_path}/repo", "--torch-python", f"{tmp_path}/torch-python"),
        *("--log", f"{tmp_path}/log.txt"),
        *("--train-files", f"{tmp_path}/shards/train_*.bin", "--val-files", f"{tmp_path}/shards/val_*.bin"),
        *("--val-tokens", "131072", "--val-every", "2", "--steps", "4"),
    ]


def run(*flags: str):
    script.train(script._parse(flags))


def test_every_micro_batch_is_trained_on_once_across_shards(machine, tmp_path, capsys):
    """Shards of 40 micro-batches with losses 1 and 2: the third step takes 8 of the one and 8 of the other."""
    run(*machine)
    log = read_log(tmp_path / "log.txt")
    assert [point.loss for point in log.train_points] == [1, 1, 1.5, 2]
    assert [(point.step, point.val_loss) for point in log.points] == [(0, 3.25), (2, 3.25), (4, 3.25)]
    assert log.complete and not list(tmp_path.glob("*.unfinished"))
    assert capsys.readouterr().out.count("train_loss") == 4
    digest = hashlib.sha256(STAND_IN.encode()).hexdigest()
    assert f"train_gpt.py of SHA-256 {digest}\n" in (tmp_path / "log.txt").read_text()
    assert "# PyTorch 2.0, an H100\n" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_step_is_made_of_the_same_micro_batches_on_any_number_of_gpus(machine, tmp_path, gpus):
    """And its loss is the mean over all of them: the rank, which each process adds to its losses, is (gpus - 1) / 2."""
    run(*machine, "--gpus", str(gpus), "--val-tokens", str(131_072 * gpus), "--save-start", str(tmp_path / "start.pt"))
    trained_on = [json.loads((tmp_path / f"told.json.{rank}").read_text()) for rank in range(gpus)]
    assert {len(places) for places in trained_on} == {4 * 16 // gpus}
    for step in range(4):
        share = slice(step * 16 // gpus, (step + 1) * 16 // gpus)
        together = sorted(place for places in trained_on for place in places[share])
        assert together == list(range(16 * step, 16 * (step + 1)))
    losses = [point.loss - (gpus - 1) / 2 for point in read_log(tmp_path / "log.txt").train_points]
    text = (tmp_path / "log.txt").read_text()
    assert losses == [1, 1, 1.5, 2] and text.count("train_loss:") == 4
    assert text.count("# PyTorch ") == 1 and f"# PyTorch 2.0, {f'{gpus} x ' * (gpus > 1)}an H100\n" in text


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("place", ['print0(f"step:{step+1}/', "train_seq_len =", "grad_accum_steps_per_device ="])
def test_a_line_that_is_missing_or_double_stops_the_script(machine, tmp_path, place, times):
    lines = STAND_IN.splitlines(keepends=True)
    (index,) = (i for i, line in enumerate(lines) if place in line)
    source = "".join([*lines[:index], lines[index] * times, *lines[index + 1 :]])
    (tmp_path / "repo" / "train_gpt.py").write_text(source)
    with pytest.raises(UserError, match=f"found {times} times instead of once"):
        run(*machine, "--gpus", "2", "--val-tokens", "262144")


def test_weights_are_kept_and_given_back(machine, tmp_path):
    start = str(tmp_path / "start.pt")
    run(*machine, "--save-start", start)
    (tmp_path / "start.pt").write_text((tmp_path / "start.pt").read_text().replace("3", "7"))
    run(*machine, "--log", str(tmp_path / "second.txt"), "--start", start)
    assert read_log(tmp_path / "second.txt").points[0].val_loss == 7.25


def test_the_program_is_told_system_seed_and_validation(machine, tmp_path):
    """And of a shard that is not needed, it is told nothing."""
    write_shard(tmp_path / "shards" / "train_3_.bin", np.zeros(131_074, np.int64))
    run(*machine, "--system", "no-value-embeddings", "--seed", "5")
    assert json.loads((tmp_path / "told.json").read_text()) == {
        "shards": ["train_1_.bin", "train_2_.bin"],
        "seed": 5,
        "schedule": list(range(12)),
        "files": f"{tmp_path}/shards/val_*.bin",
        "tokens": 131_072,
    }


def test_the_recurrent_schedule_is_the_program_s_own_and_nothing_is_recomputed(machine, tmp_path):
    args = script._parse([*machine, "--save-start", str(tmp_path / r"it's \1 \"a\".pt")])
    source = apply_patches(STAND_IN, script.patches(args), "train_gpt.py")
    assert "self.layer_seq = [0, 1, 1, 2]" in source and "# x, v1 = checkpoint(" in source
    assert repr(str(args.save_start)) in source
    compile(source, "train_gpt.py", "exec")


def test_it_can_stop_early_and_keep_the_weights(machine, tmp_path):
    run(*machine, "--stop-after", "2", "--save-end", str(tmp_path / "end.pt"))
    log = read_log(tmp_path / "log.txt")
    assert [point.step for point in log.points] == [0, 2] and not log.complete
    assert [point.step for point in log.train_points] == [1, 2]
    assert json.loads((tmp_path / "end.pt").read_text()) == {"step": 2, "model": {"w": 3}}


def test_the_end_of_a_whole_run_is_kept(machine, tmp_path):
    run(*machine, "--save-end", str(tmp_path / "end.pt"))
    assert read_log(tmp_path / "log.txt").complete
    assert json.loads((tmp_path / "end.pt").read_text()) == {"step": 4, "model": {"w": 3}}


def test_the_first_weights_of_a_seed_are_made_without_a_step(machine, tmp_path):
    run(*machine, "--seed", "1234", "--stop-after", "0", "--save-start", str(tmp_path / "start.pt"))
    assert json.loads((tmp_path / "start.pt").read_text()) == {"step": 0, "model": {"w": 3}}
    assert not (tmp_path / "told.json").exists()
    assert all(line.startswith("#") for line in (tmp_path / "log.txt").read_text().splitlines())


def test_a_failing_program_shows_its_last_lines_and_keeps_its_steps(machine, tmp_path):
    source = STAND_IN.replace(
        "    approx_training", '    if step == 2: raise SystemExit("no memory")\n    approx_training'
    )
    (tmp_path / "repo" / "train_gpt.py").write_text(source)
    with pytest.raises(UserError, match=r"(?s)status 1.*step:2/4 val_loss.*no memory.*log.txt.unfinished"):
        run(*machine)
    assert not (tmp_path / "log.txt").exists()
    assert len((tmp_path / "log.txt.unfinished").read_text().splitlines()) == 4 + 4
    with pytest.raises(UserError, match=r"log\.txt\.unfinished exists already"):
        run(*machine)


def test_an_interrupted_run_leaves_no_process_and_keeps_its_steps(machine, tmp_path):
    source = STAND_IN.replace(
        "    approx_training",
        '    if step == 2: open(os.environ["TOLD"], "w").write(str(os.getpid())); __import__("time").sleep(600)\n'
        "    approx_training",
    )
    (tmp_path / "repo" / "train_gpt.py").write_text(source)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    script_process = subprocess.Popen([sys.executable, SCRIPT, *machine], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    told, log = tmp_path / "told.json", tmp_path / "log.txt.unfinished"
    while not (told.exists() and told.read_text() and log.exists() and "step:2/" in log.read_text()):
        assert script_process.poll() is None
        time.sleep(0.05)
    script_process.send_signal(signal.SIGINT)
    assert "interrupted; the lines of its steps are in" in script_process.communicate(timeout=60)[1]
    assert script_process.returncode == 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert "step:2/4 train_loss" in log.read_text()


def test_a_file_that_is_no_text_is_refused(machine, tmp_path):
    (tmp_path / "repo" / "train_gpt.py").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no UTF-8 text"):
        run(*machine)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--torch-repo", "/nowhere"], "must be a checkout"),
        (["--steps", "0"], "--steps is 0"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "3"], "--gpus 3: a step has 16 sequences .* use 1, 2, 4, 8 or 16"),
        (["--gpus", "16"], "--gpus 16: this machine has 8 that may be used"),
        (["--gpus", "2"], "--val-tokens is 131072; use a multiple of 262144, 2 sequences"),
        (["--stop-after", "4"], "less than the 4 --steps"),
        (["--log", "/tmp/same.pt", "--save-start", "/tmp/same.pt"], "--log and --save-start are both /tmp/same.pt"),
        (["--save-start", "/tmp/same.pt", "--save-end", "/tmp/same.pt"], "choose two names"),
        (["--stop-after", "-1"], "--stop-after is -1"),
        (["--steps", "6"], "of which 2,359,296 are needed"),
        (["--val-tokens", "1000"], "multiple of 131072"),
        (["--start", "/nowhere.pt"], "is missing"),
        (["--save-start", "/nowhere/start.pt"], "no folder /nowhere"),
        (["--log", str(SCRIPT)], "exists already"),
        (["--torch-python", "/nowhere"], "cannot be started.*it made no step"),
        (["--torch-python", "/bin/false"], "(?s)status 1.*it made no step"),
    ],
)
def test_what_cannot_work_is_said_first(machine, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(*machine, *flags)
    assert not list(tmp_path.glob("log.txt*"))


@pytest.mark.parametrize("flag", ["--train-files", "--val-files"])
def test_a_glob_that_the_program_reads_in_another_way_is_refused(machine, tmp_path, flag):
    with pytest.raises(UserError, match=r"reads \*\* as \*"):
        run(*machine, flag, f"{tmp_path}/**/*_.bin")
