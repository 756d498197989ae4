"""A study of tiny runs, and scripts/ablate.py as a process."""

import os
import subprocess
import sys
from pathlib import Path

from senano_jax.data import sample

SCRIPTS = Path(__file__).parents[1] / "scripts"
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


class Command:
    """Starts the command; leaving the context ends what still runs."""

    def __enter__(self):
        self._processes = []
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()

    def __call__(self, *arguments):
        command = [sys.executable, str(SCRIPTS / "ablate.py"), *map(str, arguments)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}  # as here: sums depend on a device's threads
        self._processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
        return self._processes[-1]


def output_of(process):
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


def changed_study(tmp_path, *replacements):
    """A file of the tiny study with some of its text replaced, each at its first place."""
    text, path = TINY, tmp_path / "study.toml"
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
