"""The decision: named reasons, their order, and what each does to the mode."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtrain.adaptive.policy import Measurement, should_use_lowrank_training
from svdtrain.config import CALIBRATED_PRESETS, SVD_PRESETS, CalibratedThresholds

CALM = {
    "principal_alignment": 0.2,
    "minor_alignment": 0.8,
    "subspace_angle": 0.01,
    "concentration": 0.5,
    "reconstruction_error": 0.001,
    "minor_energy": 0.1,
    "update_size": 0.01,
    "update_alignment": 0.2,
    "r_next": 90,
}
CONSERVATIVE = SVD_PRESETS["conservative"]


def decide(lowrank: bool = False, step: int = 100, preset: str = "conservative", **changes: float) -> tuple:
    measured = Measurement(**{**CALM, **changes})  # type: ignore[arg-type]
    use, r, diagnostics = should_use_lowrank_training(
        measured, SVD_PRESETS[preset], lowrank=lowrank, r=100, step=step, warmup=10
    )
    return use, r, diagnostics["reason"]


@pytest.mark.parametrize("lowrank", [False, True])
def test_every_reason(lowrank: bool) -> None:
    assert decide(lowrank, step=9, principal_alignment=0.9) == (lowrank, 100, "warmup")
    assert decide(lowrank) == (True, 90, "optimal_lowrank_conditions")
    assert decide(lowrank, principal_alignment=0.41) == (True, 90, "gradient_clobbering_risk")
    assert decide(lowrank, reconstruction_error=0.011) == (False, 90, "reconstruction_unsafe")
    assert decide(lowrank, subspace_angle=0.11) == (lowrank, 90, "neutral")
    assert decide(lowrank, minor_alignment=0.59) == (lowrank, 90, "neutral")
    assert decide(lowrank, minor_energy=0.0, principal_alignment=0.9) == (False, 90, "nothing_to_train")


def test_danger_comes_before_reconstruction() -> None:
    assert decide(principal_alignment=0.41, reconstruction_error=0.5)[2] == "gradient_clobbering_risk"


def test_without_a_history_the_subspace_is_not_stable() -> None:
    assert decide(subspace_angle=math.nan) == (False, 90, "neutral")


def test_thresholds_come_from_the_preset() -> None:
    assert decide(principal_alignment=0.31, preset="fast")[2] == "gradient_clobbering_risk"
    assert decide(principal_alignment=0.31, preset="conservative")[2] == "optimal_lowrank_conditions"


share = st.floats(0, 1)


@given(share, share, st.floats(0, 2), share, st.booleans(), st.integers(0, 50))
def test_reason_and_mode_agree(p: float, q: float, angle: float, error: float, lowrank: bool, step: int) -> None:
    numbers = {"principal_alignment": p, "minor_alignment": q, "subspace_angle": angle, "reconstruction_error": error}
    use, _, reason = decide(lowrank, step, **numbers)
    if reason in ("warmup", "neutral"):
        assert use == lowrank
    elif reason == "reconstruction_unsafe":
        assert not use
        assert error > CONSERVATIVE.reconstruction
    else:
        assert use
        assert p > CONSERVATIVE.danger or (q > CONSERVATIVE.safe and angle < CONSERVATIVE.angle)


QUIET = {**CALM, "update_lift": 1.2, "update_z": 1.0, "gradient_lift": 1.2, "gradient_z": 1.0, "rotation_ratio": 1.0}
LIMITS = CALIBRATED_PRESETS["conservative"]


def calibrated(lowrank: bool = False, analyses: int | None = None, **changes: float) -> tuple[bool, str]:
    measured = Measurement(**{**QUIET, **changes})  # type: ignore[arg-type]
    use, _, diagnostics = should_use_lowrank_training(
        measured, CONSERVATIVE, lowrank=lowrank, r=100, step=100,
        calibrated=LIMITS, analyses_in_mode=analyses, min_dwell=3,
    )  # fmt: skip
    return use, diagnostics["reason"]


def test_calibrated_alarm_needs_lift_and_z_of_the_update() -> None:
    assert calibrated() == (False, "neutral")
    assert calibrated(principal_alignment=0.9) == (False, "neutral")  # a share alone is no evidence
    assert calibrated(update_lift=2.1) == (False, "neutral")  # may be chance
    assert calibrated(update_z=9.0) == (False, "neutral")  # certain, but small
    assert calibrated(update_lift=2.1, update_z=4.1) == (True, "gradient_clobbering_risk")
    assert calibrated(gradient_lift=3.0, gradient_z=9.0) == (False, "neutral")  # the gradient is not the update


def test_calibrated_alarm_by_rotation() -> None:
    assert calibrated(rotation_ratio=3.1) == (True, "gradient_clobbering_risk")
    # What turns U_k lies outside U_k, so the principal share of such an update is small: the two alarms are different.
    assert calibrated(rotation_ratio=3.1, update_lift=0.1) == (True, "gradient_clobbering_risk")


def test_measured_interference_has_the_last_word() -> None:
    alarm = {"update_lift": 2.1, "update_z": 4.1}
    assert calibrated(**alarm, interference=0.02) == (True, "gradient_clobbering_risk")
    assert calibrated(**alarm, interference=-0.02) == (False, "neutral")


def test_a_matrix_that_is_still_being_built_is_not_protected() -> None:
    """Zero at the start, W is the sum of its updates: they align with it without clobbering anything."""
    alarm = {"update_lift": 4.0, "update_z": 90.0}
    assert calibrated(**alarm, update_size=0.8) == (False, "neutral")
    assert calibrated(**alarm, update_size=0.4) == (True, "gradient_clobbering_risk")


def test_hysteresis_between_the_two_lifts() -> None:
    inside = {"gradient_lift": 1.7, "gradient_z": 5.0}
    assert calibrated(True, 10, **inside) == (True, "neutral")
    assert calibrated(False, update_lift=1.7, update_z=5.0) == (False, "neutral")
    assert calibrated(True, 10, gradient_lift=2.1, gradient_z=5.0) == (True, "gradient_clobbering_risk")
    assert calibrated(True, 10, gradient_lift=1.4) == (False, "risk_over")


def test_low_rank_mode_judges_the_gradient() -> None:
    """The update is confined to the minor directions by construction there."""
    confined = {"update_lift": 0.1, "update_z": -9.0}
    assert calibrated(True, 10, **confined, gradient_lift=2.1, gradient_z=5.0) == (True, "gradient_clobbering_risk")


def test_dwell() -> None:
    assert calibrated(True, 2, gradient_lift=1.4) == (True, "dwell")
    assert calibrated(True, 3, gradient_lift=1.4) == (False, "risk_over")
    alarm = {"update_lift": 2.1, "update_z": 4.1}
    assert calibrated(False, 2, **alarm) == (False, "dwell")
    assert calibrated(False, None, **alarm) == (True, "gradient_clobbering_risk")  # it never switched before
    assert calibrated(True, 1, minor_energy=0.0) == (False, "nothing_to_train")  # would never train again


def test_calibrated_optimal_conditions() -> None:
    assert calibrated(update_lift=0.9) == (True, "optimal_lowrank_conditions")
    assert calibrated(update_lift=0.9, reconstruction_error=0.02) == (False, "neutral")
    assert calibrated(True, 9, gradient_lift=0.9) == (True, "optimal_lowrank_conditions")


def test_calibrated_without_history_waits() -> None:
    nothing = {"update_lift": math.nan, "update_z": math.nan, "rotation_ratio": math.nan}
    assert calibrated(**nothing) == (False, "neutral")


def test_thresholds_without_hysteresis_are_refused() -> None:
    with pytest.raises(ValueError, match="must be below lift"):
        CalibratedThresholds(lift=1.5, z=3, calm_lift=1.5, rotation=3)


@given(st.floats(0, 5), st.floats(-9, 9), st.floats(0, 9), st.floats(0, 5), st.booleans(), st.integers(0, 6))
def test_no_single_value_of_the_lift_switches_both_ways(
    lift: float, z: float, rho: float, gradient: float, lowrank: bool, analyses: int
) -> None:
    """Feeding one measurement again and again ends in a mode that stays."""
    numbers = {"update_lift": lift, "update_z": z, "gradient_lift": lift, "gradient_z": z}
    numbers["rotation_ratio"] = min(rho, LIMITS.rotation)
    first, _ = calibrated(lowrank, 10, **numbers)
    second, _ = calibrated(first, 10, **numbers)
    third, _ = calibrated(second, 10, **numbers)
    assert second == third
