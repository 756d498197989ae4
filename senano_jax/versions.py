"""Versions of installed packages."""

import importlib.metadata


def installed_version(package: str = "senano-jax") -> str | None:
    """None for one that is not installed, as when this one is run from its sources."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
