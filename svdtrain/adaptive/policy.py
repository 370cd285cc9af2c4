"""The decision: full or low-rank, for one matrix, from measured numbers. No tensors here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from svdtrain.config import PolicyThresholds


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one analysis of one matrix found. Shares are of ||G||_F^2; nan where there was nothing to compare with."""

    principal_alignment: float
    """Share of the gradient in the k = g - r principal left directions."""
    minor_alignment: float
    """The rest of it."""
    subspace_angle: float
    """Largest angle between this analysis' top-k left subspace and the last one's, radians."""
    concentration: float
    """Share of the directions that hold 90 % of the energy of W."""
    reconstruction_error: float
    """Relative Frobenius error of the best rank-r approximation of W."""
    minor_energy: float
    """Share of ||W||_F^2 in the r minor directions. 0: B and A would be zero, with gradients that are zero too."""
    update_size: float
    """||dW||_F / ||W||_F of the update applied since the last analysis."""
    update_alignment: float
    """Share of that update in the principal left directions."""
    r_next: int
    """The rank that the spectrum proposes for the next interval."""


def should_use_lowrank_training(
    measured: Measurement, thresholds: PolicyThresholds, *, lowrank: bool, r: int, step: int, warmup: int = 10
) -> tuple[bool, int, dict[str, Any]]:
    """Mode and rank until the next analysis: (use_lowrank, r_next, diagnostics with a named `reason`).

    In this order: `warmup` (nothing changes); `nothing_to_train` (full: the minor directions are exactly zero);
    `gradient_clobbering_risk` (low-rank: the principal share of the gradient is above `danger`);
    `reconstruction_unsafe` (full: rank r does not hold W); `optimal_lowrank_conditions` (low-rank: stable subspace,
    safe gradient, safe reconstruction); `neutral` (as it was).
    """
    reason = _reason(measured, thresholds, step=step, warmup=warmup)
    forced = {
        "nothing_to_train": False,
        "gradient_clobbering_risk": True,
        "reconstruction_unsafe": False,
        "optimal_lowrank_conditions": True,
    }
    use_lowrank = forced.get(reason, lowrank)
    r_next = r if reason == "warmup" else measured.r_next
    return use_lowrank, r_next, {"reason": reason, **dataclasses.asdict(measured), "r": r, "lowrank": lowrank}


def _reason(measured: Measurement, thresholds: PolicyThresholds, *, step: int, warmup: int) -> str:
    if step < warmup:
        return "warmup"
    if measured.minor_energy <= 0:
        return "nothing_to_train"
    if measured.principal_alignment > thresholds.danger:
        return "gradient_clobbering_risk"
    if measured.reconstruction_error > thresholds.reconstruction:
        return "reconstruction_unsafe"
    stable = not math.isnan(measured.subspace_angle) and measured.subspace_angle < thresholds.angle
    if stable and measured.minor_alignment > thresholds.safe:
        return "optimal_lowrank_conditions"
    return "neutral"
