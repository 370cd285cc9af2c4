"""The decision: named reasons, their order, and what each does to the mode."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtrain.adaptive.policy import Measurement, should_use_lowrank_training
from svdtrain.config import SVD_PRESETS

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
