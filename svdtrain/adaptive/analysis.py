"""One analysis of one matrix: from an exact decomposition, the gradient and the applied update to numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    matrix_participation_ratio,
    sin_theta_squared,
)
from svdtrain.spectral.null import rotation_null, rotation_ratio, share_evidence, update_variance
from svdtrain.spectral.rank import determine_next_r, initial_rank, spectrum_on_host

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
        gradient_lift, gradient_z = _evidence(G, principal, S.numel() - r)
        energy = S.double().square()
        total = float(energy.sum())
        return Measurement(
            principal_alignment=principal,
            minor_alignment=minor,
            gradient_lift=gradient_lift,
            gradient_z=gradient_z,
            concentration=compute_singular_value_concentration(S, _ENERGY_PERCENTILE),
            reconstruction_error=compute_reconstruction_error(W, U, S, V, r),
            minor_energy=float(energy[-r:].sum()) / total if total > 0 else 0.0,
            r_next=min(determine_next_r(S, history.S if history else None, r, min(r_min, r)), S.numel() - 1),
            **_since(history, W, decomposition, r),
        )


def measure_tracked(
    fast: Mapping[str, float],
    slow: Mapping[str, float],
    S: Tensor,
    S_prev: Tensor | None,
    *,
    m: int,
    r: int,
    r_min: int,
) -> Measurement:
    """The same numbers from the tracking engine: the fast lane's look at the gradient, the last analysis in the slow
    lane for what happened between two of them, and all singular values S [g] of that analysis on the host.

    `S_prev`: those of the decision before, None where there is nothing newer. Where there is no gap at k there is no
    angle either (nan).
    """
    g, energy = S.numel(), np.square(spectrum_on_host(S))
    total = float(energy.sum())
    principal = fast.get("gradient/share", (g - r) / m)  # without a gradient: chance, no evidence either way
    return Measurement(
        principal_alignment=principal,
        minor_alignment=1 - principal,
        gradient_lift=fast.get("gradient/lift", math.nan),
        gradient_z=fast.get("gradient/z", math.nan),
        concentration=slow["concentration_90"],
        reconstruction_error=math.sqrt(float(energy[r:].sum()) / total) if total > 0 else 0.0,
        minor_energy=float(energy[-r:].sum()) / total if total > 0 else 0.0,
        r_next=min(determine_next_r(S, S_prev, r, min(r_min, r)), g - 1),
        subspace_angle=slow.get("angle", math.nan),
        rotation_ratio=slow.get("rho", math.nan),
        update_size=slow.get("update_ratio", math.nan),
        update_alignment=slow.get("update_share", math.nan),
        update_lift=slow.get("update_lift", math.nan),
        update_z=slow.get("update_z", math.nan),
    )


def _evidence(X: Tensor, share: float, k: int) -> tuple[float, float]:
    """Lift and z of the share of X [m, n] in k left directions; nan for X = 0."""
    participation = matrix_participation_ratio(X)
    if not float(participation) > 0:
        return math.nan, math.nan
    evidence = share_evidence(participation.new_tensor(share), k, X.shape[-2], participation)
    return float(evidence.lift), float(evidence.z)


def _since(history: History | None, W: Tensor, decomposition: Decomposition, r: int) -> dict[str, float]:
    """What happened since the last analysis: rotation and applied update. All nan without one."""
    names = ("subspace_angle", "rotation_ratio", "update_size", "update_alignment", "update_lift", "update_z")
    numbers: dict[str, float] = {name: math.nan for name in names}
    if history is None:
        return numbers
    U, S = decomposition.U, decomposition.S
    dW = W.detach() - history.W
    numbers["update_size"] = float(torch.linalg.vector_norm(dW) / torch.linalg.vector_norm(W.detach()))
    if numbers["update_size"] > 0:
        share, _ = compute_gradient_alignment(dW, U, S, r)
        lift, z = _evidence(dW, share, S.numel() - r)
        numbers |= {"update_alignment": share, "update_lift": lift, "update_z": z}
    k = min(history.U_k.shape[1], S.numel() - r)
    if k > 0:
        numbers["subspace_angle"] = compute_subspace_angle(history.U_k, U, k)
        turned = sin_theta_squared(history.U_k[:, :k], U[:, :k])
        expected = rotation_null(history.S, k, update_variance(dW), W.shape[0])
        numbers["rotation_ratio"] = float(rotation_ratio(turned, expected))
    return numbers
