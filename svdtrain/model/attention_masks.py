"""Which keys a query sees, as masks that are built once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def remembered(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build` with a cache. Inside torch.compile there is none: the mask is built in the graph, once per shape."""

    @functools.lru_cache(maxsize=16)
    def cached(*args: Any) -> Any:
        with torch.inference_mode(False):  # a mask first needed in evaluation must also serve training
            return build(*args)

    def choose(*args: Any) -> Any:
        return build(*args) if torch.compiler.is_compiling() else cached(*args)

    return choose


def window_mask(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [length, total]: which keys the last `length` of `total` positions see; True = visible."""
    rows = torch.arange(total - length, total, device=device)[:, None]
    columns = torch.arange(total, device=device)[None, :]
    visible = columns <= rows
    return visible if window is None else visible & (rows - columns <= window)
