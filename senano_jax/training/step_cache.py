"""Compiled training steps on disk, found by what they are made from, without tracing them.

JAX keeps what XLA has compiled (`compilation_cache`), but to ask for it a step must first be traced and lowered: on a
GPU's host 8 s for `recurrent` and 12 s for `tied-recurrent`, most of it Python that lowers kernels. Here the package's
files, the configuration, versions, settings and devices tell which program a step is.

They do so where nobody has replaced a function of the package in memory, as a notebook may: commands have these steps,
programs do not. GPUs alone, as code for a CPU may be of another processor than the next machine's.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from senano_jax import IMPORTED_AT
from senano_jax.config import Config
from senano_jax.files import write_atomically
from senano_jax.kernels.choice import on_gpu
from senano_jax.kernels.hopper_compilation import compile_kernels_beside
from senano_jax.training.agreement import checksums_of_files, package_files, values_of
from senano_jax.training.cache_events import cache_events
from senano_jax.training.own import NOTHING_OWN, Own
from senano_jax.training.step import StepMetrics

KEPT = 16  # steps, those used last: 10 to 100 MB each
_PACKAGES = ("jax", "flax", "optax", "numpy", "ml", "opt", "scipy", "nvidia")  # the first part of their names
_SHOW = ("senano_jax/runlog/", "senano_jax/interop/", "senano_jax/profiling/")  # files that no step is made of
# Of a Config: what no step depends on. All else counts, also what changes none.
_OF_A_RUN = {
    "run_dir", "resume", "seed", "init_from", "val_every", "checkpoint_every", "checkpoint_keep",
    "checkpoint_keep_every", "tensorboard", "wandb", "data",
}  # fmt: skip
_DIGEST = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


class StepCache:
    """Compiled steps of one configuration on one set of devices, in files named by a checksum of all they are made
    from. Steps differ by their `visits` of the loop and by the shapes, types and places of their arguments."""

    def __init__(self, folder: Path, files: Mapping[str, str], config: Config, mesh: Mesh):
        """`files` are the checksums of this package's files, as this process has imported them."""
        self._folder = folder
        self._devices = list(mesh.devices.flat)
        self._made_from = {"files": files} | _made_from(config, mesh)
        self._known: dict[Path, jax.stages.Compiled] = {}

    def path(self, visits: int | None, arguments: tuple) -> Path:
        """Where the step is, or would be."""
        text = json.dumps([self._made_from, visits, _described(arguments)], sort_keys=True, default=str)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.step"

    def find(self, path: Path, arguments: tuple) -> jax.stages.Compiled | None:
        """The step of these arguments; None if there is none, or none that loads."""
        if path in self._known:
            return self._known[path]
        try:
            if path.stat().st_uid != os.getuid():  # to load it is to run what its owner says
                return None
            content = memoryview(path.read_bytes())
            digest, payload = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            trees = jax.tree.structure((arguments, {})), jax.tree.structure((arguments[0], StepMetrics(0, 0)))
            self._known[path] = deserialize_and_load(payload, *trees, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception:  # of a library that does not read it: it is compiled, and written, again
            _log.debug("%s: cannot be loaded", path, exc_info=True)
            return None
        with contextlib.suppress(OSError):  # a folder to read from alone
            os.utime(path)  # it is used
        return self._known[path]

    def remember(self, path: Path, compiled: jax.stages.Compiled) -> None:
        """As long as this process lives."""
        self._known[path] = compiled

    def keep(self, path: Path, compiled: jax.stages.Compiled) -> threading.Thread:
        """Writes the step in a thread, which it returns; forgets those that have not been used for longest. What cannot
        be kept is not: no run ends for that."""
        writer = threading.Thread(target=self._write, args=(path, compiled), name="step cache")
        writer.start()
        return writer

    def _write(self, path: Path, compiled: jax.stages.Compiled) -> None:
        try:
            payload, *_ = serialize(compiled)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, hashlib.sha256(payload).digest(), payload)
            for old in sorted(self._folder.glob("*.step"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink()
        except Exception:
            _log.debug("%s: cannot be kept", path, exc_info=True)


def open_step_cache(config: Config, own: Own, mesh: Mesh) -> StepCache | None:
    """None where steps are not kept: without a folder of compiled programs, on other devices than GPUs, with several
    processes, where this package's files have just changed, and with a model or an optimiser of a program's own, of
    which the configuration does not say all."""
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or "://" in folder or not jax.config.jax_enable_compilation_cache:
        return None
    if not on_gpu() or jax.process_count() > 1 or own != NOTHING_OWN:
        return None
    files = _files()
    return None if files is None else StepCache(Path(folder) / "steps", files, config, mesh)


def _files() -> dict[str, str] | None:
    """Checksums of this package's files; None if one has changed since this process began to import them: it may be
    another one. The time of the change counts, as copies and installations bring an older time of their own."""
    try:
        if max(path.stat().st_ctime for path in package_files()) >= IMPORTED_AT:
            return None
        return {name: checksum for name, checksum in checksums_of_files().items() if not name.startswith(_SHOW)}
    except OSError:  # one is being replaced
        return None


def compiled_step(step: Callable, visits: int | None, arguments: tuple, cache: StepCache | None) -> Callable:
    """`step`, which applies the loop `visits` times, for arguments of these shapes, types and places: from `cache`, or
    compiled and, unless JAX had it, kept there. Without a cache it is what its first call compiles."""
    if cache is not None:
        path = cache.path(visits, arguments)
        if (found := cache.find(path, arguments)) is not None:
            return found
    lowered = step.lower(*arguments)
    compile_kernels_beside(lowered)
    if cache is None:
        return step
    with cache_events() as events:
        compiled = lowered.compile()
    cache.remember(path, compiled)
    if "cache_hits" not in events:  # XLA does not write what it has read from there (on CPUs, not whole)
        cache.keep(path, compiled)
    return compiled


def _made_from(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Values of the configuration, versions, settings and devices."""
    values = {name: value for name, value in values_of(config).items() if name.split(".")[0] not in _OF_A_RUN}
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    for found in importlib.metadata.distributions():  # the first of a name is the one that is imported
        if (found.name or "").lower().startswith(_PACKAGES):
            versions.setdefault(found.name, found.version)
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    client = mesh.devices.flat[0].client
    machine = {
        "devices": [_device(device) for device in mesh.devices.flat],
        "platform": (client.platform, client.platform_version),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    return {"values": values, "versions": versions, "settings": settings, "machine": machine}


def _device(device: jax.Device) -> list:
    """What kernels are chosen and sized by."""
    of_gpu = (getattr(device, name, None) for name in ("compute_capability", "core_count"))
    return [device.id, device.device_kind, *of_gpu]


def _described(arguments: tuple) -> list[str]:
    leaves, tree = jax.tree.flatten(arguments)
    return [str(tree)] + [f"{jax.typeof(leaf)} {getattr(leaf, 'sharding', None)}" for leaf in leaves]
