"""Which triton is installed, read without importing it."""

from __future__ import annotations

import importlib.metadata
import re
from functools import lru_cache

PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm")
"""What brings the module `triton`: the second and third come with nightly and ROCm builds of torch."""


@lru_cache(maxsize=1)
def triton_version() -> str:
    """As its package states it, such as "3.6.0"; "" where there is none."""
    for name in PACKAGES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare: "3.7.1+git" -> (3, 7, 1); () of ""."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
