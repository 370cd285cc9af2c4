"""Full-precision products, whatever the training loop has chosen for its own matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside: no autograd, no autocast, and no TF32 or bf16 shortcuts in float32 products.

    `W <- W_p + B A` is written back at every step. With TF32 the product is off by about 1e-3 of itself, as much as
    a whole training step, so the loop's speed setting must not reach it. Restored on exit: compiled graphs are
    guarded on these settings and would otherwise recompile.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # before torch 2.9
        previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(previous)
        return
    before = [backend.fp32_precision for backend in backends]
    inside = not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)
    if inside and all(precision == "ieee" for precision in before):  # entering again would cost more than the product
        yield
        return
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
