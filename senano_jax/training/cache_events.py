"""What JAX's persistent cache of compiled programs did."""

import contextlib
import threading
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def cache_events() -> Iterator[dict[str, float]]:
    """Events of the persistent cache inside the context, by their last name: seconds, or 1 for those without. Those of
    other threads, which compile kernels, do not count."""
    events: dict[str, float] = {}
    thread = threading.get_ident()

    def record(event: str, seconds: float = 1.0, **_) -> None:
        if event.startswith("/jax/compilation_cache/") and threading.get_ident() == thread:
            events[event.rsplit("/", 1)[1]] = seconds

    jax.monitoring.register_event_listener(record)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(record)
        jax.monitoring.unregister_event_duration_listener(record)
