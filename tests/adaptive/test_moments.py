"""The maps of optimizer state between W and its factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdtrain.adaptive import moments


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


sizes = {"m": st.integers(2, 9), "n": st.integers(2, 9), "seed": st.integers(0, 50)}


@settings(deadline=None, max_examples=40)
@given(r=st.integers(1, 6), **sizes)
def test_inverse_is_the_least_norm_solution(m: int, n: int, r: int, seed: int) -> None:
    """Against a dense pseudo-inverse of the stacked linear system."""
    r = min(r, m, n)
    B, A, M = random(m, r, seed=seed), random(r, n, seed=seed + 1), random(m, n, seed=seed + 2)
    M_B, M_A = moments.first_to_factors(M, B, A)
    # row-major vec: vec(M A^T) = (I kron A) vec(M), vec(B^T M) = (B^T kron I) vec(M)
    system = torch.cat([torch.kron(torch.eye(m).double(), A), torch.kron(B.T.contiguous(), torch.eye(n).double())])
    right = torch.cat([M_B.reshape(-1), M_A.reshape(-1)])
    expected = (torch.linalg.pinv(system) @ right).reshape(m, n)
    torch.testing.assert_close(moments.first_from_factors(M_B, M_A, B, A), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(r=st.integers(1, 5), **sizes)
def test_contradicting_moments_are_averaged_where_both_speak(m: int, n: int, r: int, seed: int) -> None:
    r = min(r, m, n)
    B, A = random(m, r, seed=seed), random(r, n, seed=seed + 1)
    first, second = random(m, n, seed=seed + 2), random(m, n, seed=seed + 3)
    got = moments.first_from_factors(first @ A.T, B.T @ second, B, A)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    outside_B, outside_A = torch.eye(m).double() - P_B, torch.eye(n).double() - P_A
    expected = outside_B @ first @ P_A + P_B @ second @ outside_A + P_B @ (first + second) @ P_A / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(r=st.integers(1, 5), **sizes)
def test_mapping_there_and_back_again_there_changes_nothing(m: int, n: int, r: int, seed: int) -> None:
    r = min(r, m, n)
    B, A, M = random(m, r, seed=seed), random(r, n, seed=seed + 1), random(m, n, seed=seed + 2)
    M_B, M_A = moments.first_to_factors(M, B, A)
    back = moments.first_from_factors(M_B, M_A, B, A)
    again = moments.first_to_factors(back, B, A)
    torch.testing.assert_close(again[0], M_B, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again[1], M_A, rtol=1e-7, atol=1e-7)


def test_first_moment_map_commutes_with_the_average_of_gradients() -> None:
    """The mapped momentum is the momentum that the factors' own gradients would have built."""
    B, A = random(6, 3, seed=0), random(3, 5, seed=1)
    M_W, M_B, M_A = torch.zeros(6, 5).double(), torch.zeros(6, 3).double(), torch.zeros(3, 5).double()
    for seed in range(8):
        G = random(6, 5, seed=10 + seed)
        M_W, M_B, M_A = (0.9 * M + 0.1 * g for M, g in ((M_W, G), (M_B, G @ A.T), (M_A, B.T @ G)))
    got = moments.first_to_factors(M_W, B, A)
    torch.testing.assert_close(got[0], M_B, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], M_A, rtol=0, atol=1e-12)


def test_second_moment_map_is_the_expectation_for_independent_entries() -> None:
    B, A, v = random(4, 2, seed=0), random(2, 5, seed=1), random(4, 5, seed=2).square()
    G = random(40_000, 4, 5, seed=3) * v.sqrt()
    got_B, got_A = moments.second_to_factors(v, B, A)
    torch.testing.assert_close(got_B, (G @ A.T).square().mean(0), rtol=0.05, atol=0)
    torch.testing.assert_close(got_A, (B.T @ G).square().mean(0), rtol=0.05, atol=0)


def test_second_moment_back_is_exact_for_rank_one() -> None:
    B, A = random(4, 2, seed=0), random(2, 5, seed=1)
    v = torch.full((4, 5), 0.3).double()
    torch.testing.assert_close(
        moments.second_from_factors(*moments.second_to_factors(v, B, A), B, A), v, rtol=1e-9, atol=0
    )
    rows = torch.tensor([1.0, 2, 3, 4]).double()[:, None]
    v = rows.expand(4, 5)
    got = moments.second_from_factors(*moments.second_to_factors(v, B, A), B, A)
    torch.testing.assert_close(got[:, 0] / got[0, 0], rows[:, 0], rtol=1e-9, atol=0)
    zero = moments.second_from_factors(torch.zeros(4, 2), torch.zeros(2, 5), B.float(), A.float())
    assert torch.equal(zero, torch.zeros(4, 5))


def test_adam_state_bounds_the_first_update() -> None:
    """A rank-one gradient breaks the independence that the squared map assumes; v >= m^2 must hold all the same."""
    B, A = random(6, 3, seed=0), random(3, 5, seed=1)
    M = torch.ones(6, 5).double()
    state = {"step": torch.tensor(7.0), "exp_avg": M, "exp_avg_sq": M.square()}
    state_B, state_A = moments.state_to_factors(state, B, A)
    for part in (state_B, state_A):
        assert float(part["step"]) == 7
        assert part["step"] is not state["step"]
        assert bool((part["exp_avg_sq"] >= part["exp_avg"].square() * (1 - 1e-12)).all())
    naive, _ = moments.second_to_factors(M.square(), B, A)
    assert not torch.allclose(state_B["exp_avg_sq"], naive)  # the bound did something here


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6)])
def test_muon_state_keeps_its_own_side(m: int, n: int) -> None:
    B, A = random(m, 3, seed=0), random(3, n, seed=1)
    reduced = random(*((m, 1) if m >= n else (1, n)), seed=2).square()
    state = {"momentum_buffer": random(m, n, seed=3), "second_momentum_buffer": reduced}
    state_B, state_A = moments.state_to_factors(state, B, A)
    assert state_B["second_momentum_buffer"].shape == (m, 1)
    assert state_A["second_momentum_buffer"].shape == (1, n)
    inherited, restarted = (state_B, state_A) if m >= n else (state_A, state_B)
    assert torch.equal(inherited["second_momentum_buffer"], reduced)
    assert not restarted["second_momentum_buffer"].any()
    back = moments.state_from_factors(state_B, state_A, B, A)
    assert torch.equal(back["second_momentum_buffer"], reduced)


def test_vanishing_factor_directions_stay_zero_and_finite() -> None:
    B, A = random(6, 3, seed=0), random(3, 5, seed=1)
    B[:, 1] = 0
    A[1] = 0
    M_B, M_A = moments.first_to_factors(random(6, 5, seed=2), B, A)
    got = moments.first_from_factors(M_B, M_A, B, A)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got @ A.T, M_B, rtol=0, atol=1e-9)
    zero = moments.first_from_factors(torch.zeros(6, 3), torch.zeros(3, 5), torch.zeros(6, 3), torch.zeros(3, 5))
    assert torch.equal(zero, torch.zeros(6, 5).double())


def test_unknown_state_is_named() -> None:
    with pytest.raises(moments.UnknownState, match=r"'hessian' of shape \(6, 5\)"):
        moments.state_to_factors({"hessian": torch.zeros(6, 5)}, random(6, 3, seed=0), random(3, 5, seed=1))
    with pytest.raises(moments.UnknownState, match="of shape"):
        moments.state_to_factors({"momentum_buffer": torch.zeros(4, 6, 5)}, torch.zeros(6, 3), torch.zeros(3, 5))
