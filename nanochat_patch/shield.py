"""Gradients for the method that leave the host's own untouched.

Two things stand between p.grad and an analysis after the step. nanochat's Muon of 2025 writes its update into p.grad.
And on several GPUs p.grad is this rank's share only, which `attach` averages in place: the host would then average
what is equal already, and round differently than without us. So the method sees a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class GradientShield:
    """Swaps W.grad for a copy around the method's own hooks, on the steps that `wanted` chooses.

    Four moments of a step: `enter` (before the method's pre hook) hands it a copy; `leave` (after it) gives the host
    its tensor back; the host steps; `show` (before the method's post hook) brings the copy out again. Afterwards the
    host clears W.grad, whatever it is.
    """

    def __init__(self, targets: Mapping[str, nn.Parameter], wanted: Callable[[], bool]) -> None:
        self.targets = targets
        self._wanted = wanted
        self._hosts: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}

    def enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Put copies in place of the host's gradients."""
        if not self._wanted():
            return
        for name, W in self.targets.items():
            if W.grad is not None:
                self._hosts[name] = W.grad
                W.grad = W.grad.clone()

    def leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Give the host its own gradients back and keep what the method made of the copies."""
        for name, gradient in self._hosts.items():
            copy = self.targets[name].grad
            assert copy is not None
            self._copies[name] = copy
            self.targets[name].grad = gradient
        self._hosts.clear()

    def show(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The copies, for the analysis."""
        for name, copy in self._copies.items():
            self.targets[name].grad = copy
        self._copies.clear()
