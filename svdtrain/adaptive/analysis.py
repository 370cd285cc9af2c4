"""One analysis of one matrix: from an exact decomposition, the gradient and the applied update to numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdtrain.adaptive.policy import Measurement
from svdtrain.adaptive.precision import full_precision
from svdtrain.spectral.decompose import Decomposition, DecompositionFailed, decompose_many
from svdtrain.spectral.metrics import (
    compute_gradient_alignment,
    compute_reconstruction_error,
    compute_singular_value_concentration,
    compute_subspace_angle,
)
from svdtrain.spectral.rank import determine_next_r, initial_rank

_ENERGY_PERCENTILE = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """What the next analysis compares with."""

    U_k: Tensor
    """Principal left directions [m, k] for the rank decided then."""
    S: Tensor
    """Singular values [g]."""
    W: Tensor
    """The weights themselves [m, n]: their difference is the update really applied."""

    @classmethod
    def of(cls, W: Tensor, decomposition: Decomposition, r: int) -> History:
        """After a decision for rank r; copies what would change or keep more memory alive."""
        k = decomposition.S.numel() - r
        return cls(U_k=decomposition.U[:, :k].clone(), S=decomposition.S, W=W.detach().clone())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"U_k": self.U_k, "S": self.S, "W": self.W}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> History:
        """Inverse of `state_dict`."""
        return cls(**{name: state[name].to(device, copy=True) for name in ("U_k", "S", "W")})


def decompose_all(matrices: Sequence[Tensor]) -> list[Decomposition | str]:
    """Exact decompositions in order; a reason in words where one failed."""
    try:
        return list(decompose_many(list(matrices)))
    except DecompositionFailed as failed:
        return [result if result is not None else failed.failures[index] for index, result in enumerate(failed.results)]


def starting_rank(S: Tensor, r_min: int) -> int:
    """rank(W) - 10, at least r_min, and at most g - 1 so that one principal direction is left."""
    g = S.numel()
    return min(max(initial_rank(S), r_min), g - 1)


def measure(
    W: Tensor, G: Tensor, decomposition: Decomposition, history: History | None, *, r: int, r_min: int
) -> Measurement:
    """All numbers of one analysis. W and G are [m, n]; r is the rank in force."""
    U, S, V = decomposition.U, decomposition.S, decomposition.V
    with full_precision(W.device):
        principal, minor = compute_gradient_alignment(G, U, S, r)
        angle, update_size, update_alignment = _since(history, W, decomposition, r)
        energy = S.double().square()
        total = float(energy.sum())
        return Measurement(
            principal_alignment=float(principal),
            minor_alignment=float(minor),
            subspace_angle=angle,
            concentration=float(compute_singular_value_concentration(S, _ENERGY_PERCENTILE)),
            reconstruction_error=float(compute_reconstruction_error(W, U, S, V, r)),
            minor_energy=float(energy[-r:].sum()) / total if total > 0 else 0.0,
            update_size=update_size,
            update_alignment=update_alignment,
            r_next=min(determine_next_r(S, history.S if history else None, r, min(r_min, r)), S.numel() - 1),
        )


def _since(history: History | None, W: Tensor, decomposition: Decomposition, r: int) -> tuple[float, float, float]:
    """Angle to the last basis, ||dW|| / ||W|| and principal share of dW; nan without a history."""
    if history is None:
        return math.nan, math.nan, math.nan
    U, S = decomposition.U, decomposition.S
    k = min(history.U_k.shape[1], S.numel() - r)
    dW = W.detach() - history.W
    size = float(torch.linalg.vector_norm(dW) / torch.linalg.vector_norm(W))
    share = float(compute_gradient_alignment(dW, U, S, r)[0]) if size > 0 else math.nan
    return float(compute_subspace_angle(history.U_k, U, k)) if k > 0 else math.nan, size, share
