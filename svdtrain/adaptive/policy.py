"""The decision: full or low-rank, for one matrix, from measured numbers. No tensors here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from svdtrain.config import CalibratedThresholds, PolicyThresholds


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one analysis of one matrix found; nan where there was nothing to compare with.

    "Principal" is the span of the first k = g - r left singular vectors. Shares are of a squared Frobenius norm; a lift
    is a share over its chance level k/m, a z counts standard deviations from it (svdtrain/spectral/null.py).
    """

    principal_alignment: float
    """Principal share of the gradient G."""
    minor_alignment: float
    """The rest of it."""
    subspace_angle: float
    """Largest angle between this analysis' principal subspace and the last one's, radians."""
    concentration: float
    """Share of the directions that hold 90 % of the energy of W."""
    reconstruction_error: float
    """Relative Frobenius error of the best rank-r approximation of W."""
    minor_energy: float
    """Share of ||W||_F^2 in the r minor directions. 0: B and A would be zero, with gradients that are zero too."""
    update_size: float
    """||dW||_F / ||W||_F of the update applied since the last analysis."""
    update_alignment: float
    """Principal share of that update."""
    r_next: int
    """The rank that the spectrum proposes for the next interval."""
    gradient_lift: float = math.nan
    """principal_alignment over chance."""
    gradient_z: float = math.nan
    """principal_alignment against chance, in standard deviations of an isotropic gradient of the same spectrum."""
    update_lift: float = math.nan
    """update_alignment over chance."""
    update_z: float = math.nan
    """As gradient_z, for the applied update."""
    rotation_ratio: float = math.nan
    """rho: rotation of the principal subspace over what an isotropic update of the same size would do."""
    interference: float = math.nan
    """<G_ref, dW> in nats: first-order change of the loss on reference data by this matrix; positive is harm."""


_TO_LOWRANK = frozenset({"gradient_clobbering_risk", "optimal_lowrank_conditions"})
_TO_FULL = frozenset({"nothing_to_train", "reconstruction_unsafe", "risk_over"})


def should_use_lowrank_training(
    measured: Measurement,
    thresholds: PolicyThresholds,
    *,
    lowrank: bool,
    r: int,
    step: int,
    warmup: int = 10,
    calibrated: CalibratedThresholds | None = None,
    analyses_in_mode: int | None = None,
    min_dwell: int = 0,
) -> tuple[bool, int, dict[str, Any]]:
    """Mode and rank until the next analysis: (use_lowrank, r_next, diagnostics with a named `reason`).

    Reasons, the first that holds: `warmup` (nothing changes); `nothing_to_train` (full: the minor directions are
    exactly zero); `gradient_clobbering_risk` (low-rank); `reconstruction_unsafe` (full: rank r does not hold W);
    `optimal_lowrank_conditions` (low-rank: stable subspace, safe gradient, safe reconstruction); `neutral` (as it was).
    Without `calibrated` this is the original rule on fixed shares. With it, see `_calibrated_reason`; a mode is then
    kept for `min_dwell` analyses (`dwell`; analyses_in_mode None: the matrix never switched, nothing to wait for).
    """
    if step < warmup:
        reason = "warmup"
    elif measured.minor_energy <= 0:
        reason = "nothing_to_train"
    elif calibrated is None:
        reason = _original_reason(measured, thresholds)
    else:
        reason = _calibrated_reason(measured, thresholds, calibrated, lowrank=lowrank)
    use_lowrank = lowrank if reason not in _TO_LOWRANK | _TO_FULL else reason in _TO_LOWRANK
    dwelling = calibrated is not None and analyses_in_mode is not None and analyses_in_mode < min_dwell
    if use_lowrank != lowrank and dwelling and reason != "nothing_to_train":
        use_lowrank, reason = lowrank, "dwell"
    r_next = r if reason == "warmup" else measured.r_next
    return use_lowrank, r_next, {"reason": reason, **vars(measured), "r": r, "lowrank": lowrank}


def _original_reason(measured: Measurement, thresholds: PolicyThresholds) -> str:
    if measured.principal_alignment > thresholds.danger:
        return "gradient_clobbering_risk"
    if measured.reconstruction_error > thresholds.reconstruction:
        return "reconstruction_unsafe"
    stable = measured.subspace_angle < thresholds.angle  # False for nan: no history
    if stable and measured.minor_alignment > thresholds.safe:
        return "optimal_lowrank_conditions"
    return "neutral"


def _calibrated_reason(
    measured: Measurement, thresholds: PolicyThresholds, limits: CalibratedThresholds, *, lowrank: bool
) -> str:
    """Evidence against chance instead of fixed shares.

    In full mode the applied update is judged: danger is a lift with its z, or a rotation that its size does not
    explain. In low-rank mode the update is confined to the minor directions by construction and says nothing, so the
    gradient is judged, and the danger lasts until its lift falls below `calm_lift` (hysteresis): then `risk_over`.
    Measured interference that is not positive vetoes the danger (what moves does no harm), and so does a matrix that
    is not established yet. Optimal: the update (the gradient, in low-rank mode) is no more principal than chance, the
    rotation is explained, and rank r holds W.
    """
    lift, z = (measured.gradient_lift, measured.gradient_z) if lowrank else (measured.update_lift, measured.update_z)
    # Comparisons with nan (not measured) are False.
    harmless = measured.interference <= 0 or (not lowrank and measured.update_size > limits.established)
    directed = lift > limits.lift and z > limits.z
    turning = not lowrank and measured.rotation_ratio > limits.rotation
    if (directed or turning) and not harmless:
        return "gradient_clobbering_risk"
    explained = lowrank or measured.rotation_ratio <= limits.rotation
    if lift <= 1 and explained and measured.reconstruction_error <= thresholds.reconstruction:
        return "optimal_lowrank_conditions"
    if lowrank and (lift < limits.calm_lift or harmless):
        return "risk_over"
    return "neutral"
