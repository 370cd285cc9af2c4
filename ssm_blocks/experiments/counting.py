"""Operations, kernels and memory of a computation, counted while it runs; the meta device will do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
"""Without convolutions, whose formula takes the gradients of one with a group per channel for dense products."""


class OperationCounter(TorchDispatchMode):
    """Floating-point operations by kind: products of matrices by PyTorch's formulas, triangular solves as n^2 m, all
    else as one per number that comes out. kernels: calls that compute anything; written: bytes of what they return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_products = self.elsewhere = 0.0
        self.kernels = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        computes = isinstance(out, Tensor) and not func.is_view
        if computes:
            self.kernels += 1
            self.written += out.numel() * out.element_size()
        if packet in PRODUCTS:
            self.in_products += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif computes and out.is_floating_point():
            rows = args[0].size(-1) if "triangular" in str(packet) else 1
            self.elsewhere += out.numel() * rows
        return out

    @property
    def share(self) -> float:
        """Part of all operations that is in products of matrices."""
        return self.in_products / (self.in_products + self.elsewhere)
