"""Protection without factors: W keeps its optimizer, and what the step did to the protected space is taken back.

Two kinds cannot be written as W_p + B A with fewer numbers than W: `core` (only the principal-principal block of the
update is forbidden) and `activation` (the update must not act on the principal inputs of a reference set). For both,
W <- W_before + project(W_after - W_before).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.factors import ParameterCounts
from svdtrain.adaptive.precision import full_precision
from svdtrain.spectral.activations import input_basis, remove_inputs, soft_projection
from svdtrain.spectral.decompose import Decomposition


class UpdateGuard:
    """One guarded matrix W [m, n]. r counts the free directions, as in low-rank mode."""

    def __init__(self, W: nn.Parameter, tensors: Mapping[str, Tensor], r: int) -> None:
        """tensors: U_k [m, k] and V_k [n, k] (core), P [n, k] (hard) or M [n, n] (soft)."""
        self.W = W
        self.r = r
        self.tensors = dict(tensors)
        self._before: Tensor | None = None

    @classmethod
    def core(cls, W: nn.Parameter, decomposition: Decomposition, r: int) -> UpdateGuard:
        """dW - U_k U_k^T dW V_k V_k^T with k = g - r. Raises ValueError unless 1 <= r < g."""
        k = decomposition.S.numel() - r
        if not 1 <= r < decomposition.S.numel():
            raise ValueError(f"r must lie in [1, {decomposition.S.numel() - 1}] for this matrix, got {r}")
        return cls(W, {"U_k": decomposition.U[:, :k].clone(), "V_k": decomposition.V[:, :k].clone()}, r)

    @classmethod
    def activation(cls, W: nn.Parameter, C: Tensor, share: float, strength: float) -> UpdateGuard:
        """From C [n, n] = E[x x^T] of the layer's inputs on a reference set.

        strength 0, hard: dW (I - P P^T), P the `share` x n leading eigenvectors. strength > 0, soft:
        dW Q diag(1 / (1 + strength lambda / mean lambda)) Q^T. Raises ValueError when C is not n x n.
        """
        n = W.shape[1]
        if C.shape != (n, n):
            raise ValueError(f"the input covariance must be {n} x {n} for this matrix, got {tuple(C.shape)}")
        basis = input_basis(C.to(W.device))
        if strength > 0:
            return cls(W, {"M": soft_projection(basis, strength)}, n)
        k = min(max(round(share * n), 1), n - 1)
        return cls(W, {"P": basis.top(k).clone()}, n - k)

    def before_step(self) -> None:
        """Keep W as it is before the optimizer's step."""
        self._before = self.W.detach().clone()

    def after_step(self, *, match_rms: bool) -> None:
        """Take the forbidden part of the step back; with match_rms the rest is scaled to the whole step's norm."""
        assert self._before is not None, "before_step was not called"
        with full_precision(self.W.device):
            dW = self.W - self._before
            allowed = self.project(dW)
            if match_rms:
                size = torch.linalg.vector_norm(allowed)
                scale = torch.linalg.vector_norm(dW) / size.clamp_min(torch.finfo(size.dtype).tiny)
                allowed = torch.where(size > 0, allowed * scale, allowed)
            self.W.copy_(self._before + allowed)
        self._before = None

    def project(self, dW: Tensor) -> Tensor:
        """The allowed part of an update [m, n]."""
        parts = self.tensors
        if "M" in parts:
            return dW @ parts["M"].to(dW.dtype)
        if "P" in parts:
            return remove_inputs(dW, parts["P"])
        U_k, V_k = parts["U_k"].to(dW.dtype), parts["V_k"].to(dW.dtype)
        return dW - U_k @ (U_k.T @ dW @ V_k) @ V_k.T

    def counts(self) -> ParameterCounts:
        """W is trained whole; what is stored beside it counts as frozen."""
        return ParameterCounts(
            matrix=self.W.numel(), trainable=self.W.numel(), frozen=sum(t.numel() for t in self.tensors.values())
        )

    @property
    def nbytes(self) -> int:
        """Bytes held beside W."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def split_error(self) -> float:
        """0: W is not split."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        return {"r": self.r, "tensors": dict(self.tensors)}

    @classmethod
    def from_state(cls, W: nn.Parameter, state: Mapping[str, Any]) -> UpdateGuard:
        """Inverse of `state_dict`."""
        return cls(W, {name: t.to(W.device, copy=True) for name, t in state["tensors"].items()}, state["r"])
