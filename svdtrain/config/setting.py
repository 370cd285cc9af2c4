"""What every group of settings is made with."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def advanced(default: Any) -> Any:
    """A setting that --help leaves out: a flag all the same, and a key of --config."""
    return field(default=default, metadata={"advanced": True})


def require(condition: bool, message: str) -> None:
    """ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)
