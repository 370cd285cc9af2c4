"""Work beside the training step: in a thread of its own on a side stream of a GPU, at once on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Worker:
    """Takes work in turn. What it is given must not change until it is done: hand it copies."""

    def __init__(self, device: torch.device, beside: bool | None = None) -> None:
        """`beside`: whether there is a thread; None: on a GPU."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.beside = self._stream is not None if beside is None else beside
        self._pool = ThreadPoolExecutor(1, "svd-analysis") if self.beside else None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do `work`, without gradients, after all that is on the current stream now. The future has its result once the
        device is through with it; without a thread that is now, and what `work` raises is raised here."""
        if self._pool is None:
            done: Future[T] = Future()
            done.set_result(work())
            return done
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._stream.device))
        return self._pool.submit(self._run, work, ready)

    @torch.no_grad()
    def _run(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        if self._stream is None or ready is None:
            return work()
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            result = work()
            self._stream.synchronize()
        return result
