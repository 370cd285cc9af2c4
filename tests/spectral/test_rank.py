import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdtrain.spectral.metrics import directions_for_energy
from svdtrain.spectral.rank import choose_rank, determine_next_r, initial_rank, numerical_rank
from tests.spectral.reference import gaussian

torch.set_num_threads(1)
FLAT = torch.linspace(2.0, 1.0, 100)


def test_starts_ten_below_the_rank() -> None:
    assert initial_rank(torch.linalg.svdvals(gaussian(64, 64))) == 54
    assert initial_rank(torch.linalg.svdvals(gaussian(64, 20) @ gaussian(20, 64))) == 10
    assert initial_rank(torch.ones(5)) == 1
    assert numerical_rank(torch.zeros(5)) == 0


def test_takes_a_planted_gap() -> None:
    S = FLAT.clone()
    S[:20] *= 5  # 20 strong directions
    choice = choose_rank(S, FLAT, r_current=90, r_min=8)
    assert (choice.r, choice.reason) == (80, "spectral_gap")
    assert choice.gap_ratio == pytest.approx(float(S[19] / S[20]))


def test_settled_values_shrink_and_moving_ones_hold() -> None:
    assert choose_rank(FLAT, FLAT, 90, 8).reason == "bottom_settled"
    assert determine_next_r(FLAT, FLAT, 90, 8) == 85
    moved = choose_rank(FLAT, 0.9 * FLAT, 90, 8)
    assert (moved.r, moved.reason) == (90, "bottom_still_moving")
    assert choose_rank(FLAT, None, 90, 8).reason == "no_history"


def test_never_protects_more_than_the_energy() -> None:
    S = torch.cat([torch.ones(30), torch.full((70,), 1e-3)])  # 30 directions hold 99.9 %
    choice = choose_rank(S, S, 70, 8)
    assert (choice.r, choice.reason, choice.r_energy) == (70, "energy_floor", 70)


def test_stops_at_the_minimum() -> None:
    assert choose_rank(FLAT, FLAT, 8, 8).reason == "at_minimum"
    r = 90
    for _ in range(200):
        r = determine_next_r(FLAT, FLAT, r, 8)
    assert r == 8


@given(seed=st.integers(0, 10_000), g=st.integers(2, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_never_up_never_below_the_minimum(seed: int, g: int, data: st.DataObject) -> None:
    S = gaussian(g, seed=seed).abs().sort(descending=True).values
    previous = (S * (1 + 0.02 * gaussian(g, seed=seed + 1))).abs()
    r_current = data.draw(st.integers(1, g))
    r_min = data.draw(st.integers(0, r_current))
    r = determine_next_r(S, previous, r_current, r_min)
    assert r_min <= r <= r_current
    assert r >= 0.75 * r_current


def test_values_whose_sum_overflows_are_still_finite() -> None:
    assert determine_next_r(FLAT * 1e38, None, 50, 8) == determine_next_r(FLAT, None, 50, 8)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="r_current"):
        determine_next_r(FLAT, None, 101, 8)
    with pytest.raises(ValueError, match="finite"):
        determine_next_r(torch.tensor([1.0, float("nan")]), None, 1, 1)
    with pytest.raises(ValueError, match="S_prev has shape"):
        determine_next_r(FLAT, FLAT[:5], 50, 8)
    with pytest.raises(ValueError, match="r_min"):
        determine_next_r(FLAT, None, 50, -1)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_energy_is_counted_as_by_the_metric(scale: float) -> None:
    for seed in range(20):
        S = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(descending=True)[0]
        choice = choose_rank(scale * S, None, 64, 0)
        assert 64 - choice.r_energy == int(directions_for_energy(S, 0.999))
