"""What the environment asks of JAX: never other numbers, and one line where it cannot be had."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from senano_jax import evaluate, train
from senano_jax.errors import UserError
from senano_jax.jax_settings import configure_jax, start_jax

SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    "--steps=2", "--batch-tokens=512", "--seq-len=256", "--final-window-tokens=256", "--data.val-tokens=512",
    "--data.val-seq-len=512", "--val-every=0", "--devices=1",
]  # fmt: skip
OTHER_NUMBERS = {
    "JAX_NUM_CPU_DEVICES": "8",  # as in this process: they share out the threads of a sum
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_SOFTMAX_CUSTOM_JVP": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_ERROR_CHECKING_BEHAVIOR_NAN": "raise",
}


def command(module, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"senano_jax.{module}", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def test_the_environment_changes_no_number_and_no_checkpoint(tmp_path):
    plain = train.main([*SMALL, f"--run-dir={tmp_path / 'plain'}"])
    done = command("train", *SMALL, f"--run-dir={tmp_path / 'other'}", **OTHER_NUMBERS)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "other") == losses(plain)
    done = command("evaluate", plain, **OTHER_NUMBERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"val_loss:{evaluate.main([str(tmp_path / 'other')]):.6f} tokens:512\n"


def test_bfloat16_after_float32_has_its_own_precision():
    before = jax.config.jax_default_matmul_precision
    try:
        configure_jax("float32", None)
        assert jax.config.jax_default_matmul_precision == "highest"
        configure_jax("bfloat16", None)
        assert jax.config.jax_default_matmul_precision is None
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_deterministic_asks_xla_once(monkeypatch):
    """Whether XLA then keeps to it only GPUs can tell: docs/reliability.md."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp")
    configure_jax("bfloat16", None)
    assert "deterministic" not in os.environ["XLA_FLAGS"]
    for _ in range(2):
        configure_jax("bfloat16", None, deterministic=True)
        flags = os.environ["XLA_FLAGS"].split()
        assert flags.count("--xla_gpu_deterministic_ops=true") == 1 and "--xla_dump_to=/tmp" in flags


def test_deterministic_comes_too_late_for_a_process_that_has_begun(monkeypatch):
    start_jax()
    with pytest.raises(UserError, match="--deterministic must be the choice of a process's first run"):
        start_jax(deterministic=True)
    monkeypatch.setattr("senano_jax.jax_settings._begun", [True])
    monkeypatch.setenv("XLA_FLAGS", "")
    start_jax(deterministic=True)


@pytest.mark.parametrize("arguments", [["train", *SMALL], ["profile"]])
def test_devices_that_are_not_there_are_one_line(arguments):
    done = command(*arguments, JAX_PLATFORMS="nonsense,cuda")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: JAX_PLATFORMS=nonsense,cuda: JAX finds no such device (")
    assert "; this machine has " in done.stderr and "change or unset JAX_PLATFORMS" in done.stderr


def test_values_that_jax_does_not_know_are_one_line():
    done = command("train", JAX_ENABLE_X64="maybe")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "JAX_ENABLE_X64" in done.stderr


def test_an_evaluation_of_a_safetensors_file_says_so_too(tmp_path):
    """Its configuration is read, by a module that needs JAX, before the flags are."""
    file = tmp_path / "weights.safetensors"
    file.touch()
    done = command("evaluate", file, JAX_DEFAULT_MATMUL_PRECISION="foo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith("; mend or unset the variable\n")


def test_bfloat16_products_are_summed_in_float32():
    """On a CPU too: rounding the sum once leaves 0.17%, sums in bfloat16 2%."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (2, 512, width), jnp.bfloat16) for key, width in zip(keys, (64, 256)))
    over_both = (((0, 1), (0, 1)), ((), ()))
    product = np.asarray(jax.jit(lambda a, b: jax.lax.dot_general(b, a, over_both).T)(a, b), np.float64)
    exact = np.einsum("btd,btf->df", *(np.asarray(array, np.float64) for array in (a, b)))
    assert np.linalg.norm(product - exact) < 3e-3 * np.linalg.norm(exact)
