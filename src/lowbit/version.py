"""Versions, in a leaf that anything may import: of lowbit, and of the packages it runs with."""

from functools import cache

__version__ = "0.1.0"


@cache
def version_of(package: str) -> str:
    """The installed version; read once, because it is found in the whole metadata of the package."""
    from importlib import metadata

    return metadata.version(package)
