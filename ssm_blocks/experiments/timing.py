"""What the experiments on speed share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products in TF32 on a GPU, as `svdtrain` has them; more digits than bf16 kernels keep."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def median_ms(function: Callable[[], None], repeats: int, warmup: int, device: torch.device) -> float:
    """Median milliseconds of a call, the device's work included; the first `warmup` calls are left out."""
    for _ in range(warmup):
        function()
    times = sorted(_timed(function, device) for _ in range(repeats))
    return times[len(times) // 2]


def _timed(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)
