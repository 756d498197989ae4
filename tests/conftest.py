"""For every test process: eight CPU devices, one cache of compiled programs; and the rule for tests that need a GPU."""

import gc
import os
import shutil
import tempfile

import jax
import pytest

from senano_jax.jax_settings import configure_jax

# Most of the suite's time is compilation. LLVM without optimisation and XLA's older way to write fused loops take a
# quarter of the time for the same XLA program (JAX 0.12 has only the first), and many tests compile the same. In the
# environment, so that the workers and the processes that tests start share both.
# One LLVM module a program: each of the 32 for as many threads has a start of its own, and two cores gain nothing.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# Eight devices on two busy cores may keep one another waiting; by default XLA ends the process after 40 s of that.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ.setdefault("XLA_FLAGS", f"{QUICK} {PATIENT}")
# The oracles' products are small: threads of NumPy wait for one another, busily, for longer than one of them computes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the workers; read when NumPy is loaded
configure_jax("bfloat16", None)  # and what the commands set, before the first device is looked for
# Tracing makes and drops many small objects; a look for cycles after every 700 of them took a tenth of a run's time.
gc.freeze()
gc.set_threshold(100_000, 20, 10)
OWNS_CACHE = "PYTEST_XDIST_WORKER" not in os.environ
if OWNS_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="senano-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)


# The files that take longest, which must not be left for the end, when one process has nothing to do.
LONGEST = (
    "test_parity", "test_gpt", "test_ablate", "test_processes", "test_golden", "test_shares", "test_train",
    "test_depth_trunk", "test_signals", "test_stages", "test_resume", "test_variants", "test_profile", "test_faults",
    "test_damaged_checkpoints",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_unconfigure():
    if OWNS_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
