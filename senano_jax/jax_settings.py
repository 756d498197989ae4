"""JAX as this program needs it: the settings that numbers depend on, whatever the environment says, and devices."""

import os
from collections import Counter

import jax
from jax.extend.backend import clear_backends

from senano_jax.errors import UserError
from senano_jax.files import expand_home

# JAX's own defaults, in place of what variables such as JAX_ENABLE_X64 ask for: they decide about types, roundings,
# random numbers and the order of operations, or forbid what this program does.
_FIXED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_threefry_gpu_kernel_lowering": False,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_debug_nans": False,  # a run looks itself whether its losses are finite
    "jax_debug_infs": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_transfer_guard": "allow",
}
# From JAX 0.11 on XLA hands some bfloat16 products on CPUs to a library (YNNPACK) that adds in bfloat16. Over 1,024
# terms that is an error of 2%; sums in float32, which XLA makes itself, leave that of the result's rounding, 0.17%.
_SUMS_IN_FLOAT32 = "--xla_cpu_experimental_ynn_fusion_type="
# No sums in whatever order threads come, and no kernels chosen by how fast they happened to be.
_SAME_BITS = "--xla_gpu_deterministic_ops=true"
_begun: list[bool] = []  # whether each start of this process was deterministic
_CHOOSE_DEVICES = (
    "JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS",
)  # fmt: skip
_FIND_ALL = {"jax_platforms": None, "jax_platform_name": "", "jax_num_cpu_devices": -1}


def start_jax(dtype: str = "bfloat16", compilation_cache: str | None = None, deterministic: bool = False) -> None:
    """Settings of the whole process, for activations of type `dtype`, and its devices. Processes of one job must have
    joined. Raises UserError if there is no device of the kind that the environment asks for, and for `deterministic`
    in a process that has begun without."""
    if deterministic and _begun and not _begun[0]:
        raise UserError("--deterministic must be the choice of a process's first run; start a new process for it")
    configure_jax(dtype, compilation_cache, deterministic)
    try:
        jax.devices()
    except Exception as error:  # also an AssertionError without a word
        asked = {name: os.environ[name] for name in _CHOOSE_DEVICES if os.environ.get(name)}
        asked = asked or {"jax_platforms": jax.config.jax_platforms}
        reason = " ".join(str(error).split()).split(" (")[0][:150]  # behind the bracket: advice of its own
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in asked.items())}: JAX finds no such device"
            f"{f' ({reason})' if reason else ''}; this machine has {_devices_by_default()}: change or unset "
            f"{' and '.join(asked)}, or install JAX for that device"
        ) from None
    _begun.append(deterministic)


def _devices_by_default() -> str:
    """Such as "8 x NVIDIA H100": what JAX finds where it is not told where to look."""
    before = {name: jax.config.values[name] for name in _FIND_ALL}
    for name, value in _FIND_ALL.items():
        jax.config.update(name, value)
    try:
        kinds = Counter(device.device_kind for device in jax.devices())
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    except Exception:  # something else is wrong too
        return "none that JAX can use"
    finally:
        clear_backends()
        for name, value in before.items():
            jax.config.update(name, value)


def configure_jax(dtype: str, compilation_cache: str | None, deterministic: bool = False) -> None:
    """The settings alone: exact float32 products if `dtype` asks for them, the same bits from GPUs in every run if
    `deterministic`, and the cache of compiled programs, unless JAX_COMPILATION_CACHE_DIR names one."""
    for name, value in _FIXED.items():
        jax.config.update(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ >= (0, 11) and _SUMS_IN_FLOAT32 not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SUMS_IN_FLOAT32}".strip()
    if deterministic and _SAME_BITS not in os.environ.get("XLA_FLAGS", ""):  # read with the first device
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_SAME_BITS}".strip()
    # GPUs would round float32 to TF32.
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)
    if compilation_cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(expand_home(compilation_cache)))
