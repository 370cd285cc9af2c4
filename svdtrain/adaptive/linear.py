"""AdaptiveSVDLinear: an nn.Linear that can be told to train as B and A, for people who build their own modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from svdtrain.adaptive.analysis import History, decompose_all, measure, starting_rank
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.policy import Measurement
from svdtrain.spectral.decompose import Decomposition


class AdaptiveSVDLinear(nn.Linear):
    """nn.Linear in both modes: the forward pass and the saved state are always the dense weight's.

    In low-rank mode hand `trainable()` to the optimizer, call `project_gradient()` after backward and `merge()` after
    the step. `svdtrain.attach` does all of that, and the optimizer's state, for whole models; it wants plain layers
    in full mode.
    """

    weight: nn.Parameter
    factors: FactoredWeight | None = None
    _history: History | None = None
    _r: int | None = None

    @property
    def mode(self) -> Literal["full", "lowrank"]:
        """Which of W and (B, A) is trained."""
        return "full" if self.factors is None else "lowrank"

    def trainable(self) -> list[nn.Parameter]:
        """The matrix parameters to optimise: W, or B and A."""
        return [self.weight] if self.factors is None else [self.factors.B, self.factors.A]

    def switch_to_lowrank(self, r: int) -> None:
        """Train the r minor directions, or recompute them from the current weight. The weight is not written. Raises
        ValueError unless 1 <= r < min(m, n), RuntimeError when the weight cannot be decomposed."""
        decomposition = self._decompose()
        if self.factors is None:
            self.factors = FactoredWeight.split(self.weight, decomposition, r)
        else:
            self.factors.refactor(decomposition, r)
        self._r = r

    def switch_to_full(self) -> None:
        """Train the dense weight again; it already holds W_p + B A."""
        self.factors = None

    def project_gradient(self) -> None:
        """B.grad and A.grad from weight.grad; nothing in full mode."""
        if self.factors is not None:
            self.factors.project_gradient()

    def merge(self) -> None:
        """weight <- W_p + B A after the optimizer's step, and drop the gradients; nothing in full mode."""
        if self.factors is not None:
            self.factors.merge()
            self.factors.clear_gradients()
            self.weight.grad = None

    def update_svd_tracking(self) -> Measurement:
        """Analyse the weight with the gradient now in weight.grad. Raises ValueError without a gradient."""
        if self.weight.grad is None:
            raise ValueError("no gradient: call update_svd_tracking after backward and before zero_grad")
        decomposition = self._decompose()
        r = self._r or starting_rank(decomposition.S, 1)
        measured = measure(self.weight, self.weight.grad, decomposition, self._history, r=r, r_min=1)
        self._r = self.factors.r if self.factors is not None else measured.r_next
        self._history = History.of(self.weight, decomposition, self._r)
        return measured

    @torch.no_grad()
    def _decompose(self) -> Decomposition:
        (outcome,) = decompose_all([self.weight])
        if isinstance(outcome, str):
            raise RuntimeError(f"the weight cannot be decomposed: {outcome}")
        return outcome
