"""How a function of nanochat is wrapped, and how this package ends a program that it cannot run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `make(original)`, under the original's name and documentation."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def refuse(error: Exception) -> NoReturn:
    """End the program with one line."""
    print(f"nanochat_patch: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)
