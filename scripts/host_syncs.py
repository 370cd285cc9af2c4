"""Counting the calls in which a thread waits for the GPU, as torch's debug mode sees them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def counted_syncs() -> Iterator[list[int]]:
    """Inside, each synchronising call of this thread, not of others, adds 1 to the only number of the list."""
    count, here = [0], threading.get_ident()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        count[0] += threading.get_ident() == here and "called a synchronizing" in str(message)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            yield count
    finally:
        torch.cuda.set_sync_debug_mode("default")
