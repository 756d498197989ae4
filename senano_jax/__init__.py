"""Sample-Efficient NanoGPT in JAX: a language model trained on as few FineWeb tokens as possible.

What a notebook needs is here by name, and imported when it is asked for; see docs/change_it.md.
"""

import importlib
import time
from typing import Any

IMPORTED_AT = time.time()  # a file changed since may not be what this process has imported
# Where each name is. JAX is imported with the first one that needs it.
_NAMES = {
    "Config": "config",
    "changed": "config",
    "preset": "presets",
    "preset_names": "presets",
    "register": "presets",
    "make_model": "model.build",
    "count_parameters": "model.build",
    "fit": "api",
    "Run": "api",
    "validation_loss": "api",
    "comparison": "api",
    "read_log": "runlog.reader",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'senano_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"senano_jax.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
