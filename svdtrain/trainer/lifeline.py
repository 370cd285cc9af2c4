"""A rank that dies is noticed at once, also by ranks that wait for a GPU.

A collective on a GPU whose peer is dead only ends at its time limit: between the GPUs of one node nothing reports the
loss, and the host waits for a kernel that waits for ever. So each rank holds a connection to the next one, on the CPU,
in a thread that waits for a goodbye. A connection that closes without one means that the process is gone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GRACE_S = 5.0
"""For the main thread, which may see the loss by itself and know more, or may be about to leave for a reason."""
FOR_EVER = timedelta(days=365)


class Lifeline:
    """Rank r watches rank r + 1. `on_loss` is called with a message, in the watching thread, when that rank is gone.

    Every rank makes one at the same point and calls `close` in the end, or `let_go` if it leaves because of an error.
    """

    def __init__(self, rank: int, size: int, on_loss: Callable[[str], Any], *, grace_s: float = GRACE_S) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self._watched, self._watcher = (rank + 1) % size, (rank - 1) % size
        self._on_loss, self._grace_s = on_loss, grace_s
        self._leaving = False
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """This rank is leaving by itself and has said why: what happens to the others is no news any more."""
        self._leaving = True

    def close(self, timeout_s: float = 30.0) -> None:
        """Say goodbye to the rank that watches this one, and wait for the goodbye of the watched one."""
        self.let_go()
        with contextlib.suppress(RuntimeError):  # it is gone already
            dist.send(torch.ones(1), self._watcher, group=self._group)
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        try:
            dist.recv(torch.zeros(1), self._watched, group=self._group)
        except RuntimeError:
            time.sleep(self._grace_s)
            if not self._leaving:
                self._on_loss(f"rank {self._watched} is gone: its process died or was ended; its output says why")
