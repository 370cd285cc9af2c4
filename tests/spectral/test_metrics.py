import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdtrain.spectral import metrics as M
from svdtrain.spectral.decompose import decompose
from svdtrain.spectral.metrics import (
    compute_gradient_alignment,
    compute_reconstruction_error,
    compute_singular_value_concentration,
    compute_subspace_angle,
)
from tests.spectral.reference import gaussian, orthonormal, rotated, with_spectrum

torch.set_num_threads(1)


@pytest.mark.parametrize("angle", [0.0, 1e-4, 1e-3, 0.1, 0.7, 1.5, math.pi / 2])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 1e-6)])
def test_angle_of_a_known_rotation(angle: float, dtype: torch.dtype, atol: float) -> None:
    U = orthonormal(24, 24)
    turned = rotated(U, 6, angle)
    if dtype == torch.float32 and angle > 1.4:
        atol = 2e-3  # asin of a sine known to 1e-7
    assert compute_subspace_angle(U.to(dtype), turned.to(dtype), 6) == pytest.approx(angle, abs=atol)


def test_angle_ignores_signs_order_and_rotation_inside() -> None:
    U = orthonormal(20, 8)
    mixed = U.clone()
    mixed[:, :5] = U[:, :5] @ orthonormal(5, 5, seed=3)
    assert compute_subspace_angle(U, mixed, 5) < 1e-7
    assert compute_subspace_angle(U, mixed, 3) > 0.1
    assert compute_subspace_angle(U, U, 0) == 0.0
    with pytest.raises(ValueError, match="9 directions"):
        compute_subspace_angle(U, U, 9)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 6), size=st.floats(1e-4, 1.0))
@settings(max_examples=30, deadline=None)
def test_angle_forms_agree(seed: int, k: int, size: float) -> None:
    U1 = orthonormal(16, k, seed)
    U2 = torch.linalg.qr(U1 + size * gaussian(16, k, seed=seed + 1)).Q
    exact = M.subspace_angle(U1, U2, k)
    cosines = torch.linalg.svdvals(U1.mT @ U2).clamp(max=1)
    assert float(exact) == pytest.approx(float(cosines[-1].acos()), abs=1e-6)
    bound = M.subspace_angle_bound(U1, U2)
    assert float(exact) - 1e-9 <= float(bound) <= float(exact) * 1.02 + 1e-9
    assert float(M.sin_theta_squared(U1, U2)) == pytest.approx(k - float(cosines.square().sum()), abs=1e-9)


def test_angle_is_batched() -> None:
    U = torch.stack([orthonormal(12, 12, seed) for seed in range(3)])
    turned = torch.stack([rotated(u, 4, a) for u, a in zip(U, (0.1, 0.2, 0.3), strict=True)])
    torch.testing.assert_close(M.subspace_angle(U, turned, 4), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))


@given(seed=st.integers(0, 1000), k=st.integers(1, 40), scale=st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=30, deadline=None)
def test_largest_eigenvalue_bound(seed: int, k: int, scale: float) -> None:
    X = gaussian(40, k, seed=seed)
    truth = float(torch.linalg.eigvalsh(scale * X.mT @ X)[-1])
    bound = float(M.largest_eigenvalue_bound(scale * X.mT @ X))
    assert truth * (1 - 1e-9) <= bound <= truth * k ** (1 / 1024) * (1 + 1e-9)


def test_largest_eigenvalue_bound_of_zero_is_finite() -> None:
    assert 0 <= float(M.largest_eigenvalue_bound(torch.zeros(4, 4))) < 1e-30


def test_concentration_counts_directions() -> None:
    S = torch.tensor([3.0, 2.0, 1.0, 1.0])  # energies 9, 4, 1, 1 of 15
    assert compute_singular_value_concentration(S, 0.5) == 0.25
    assert compute_singular_value_concentration(S, 0.6) == 0.25
    assert compute_singular_value_concentration(S, 0.61) == 0.5
    assert compute_singular_value_concentration(S, 1.0) == 1.0
    assert compute_singular_value_concentration(torch.ones(10), 0.9) == pytest.approx(0.9)
    assert compute_singular_value_concentration(torch.zeros(3), 0.9) == 0.0
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        compute_singular_value_concentration(S, 90)


def test_effective_ranks() -> None:
    flat = torch.ones(7)
    for rank in (M.stable_rank, M.entropy_rank, M.participation_ratio):
        assert float(rank(flat)) == pytest.approx(7)
        assert float(rank(torch.tensor([5.0, 0, 0]))) == pytest.approx(1)
        assert float(rank(torch.zeros(3))) == 0
        assert float(rank(1e30 * flat)) == pytest.approx(7)
        assert float(rank(1e-30 * flat)) == pytest.approx(7)
        assert rank(torch.ones(2, 5)).shape == (2,)
    S = torch.tensor([2.0, 1.0, 1.0])
    assert float(M.stable_rank(S)) == pytest.approx(6 / 4)
    assert float(M.participation_ratio(S)) == pytest.approx(36 / 18)
    assert float(M.entropy_rank(S)) == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2))


@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12)])
def test_participation_ratio_without_svd(shape: tuple[int, int]) -> None:
    G = gaussian(*shape)
    expected = M.participation_ratio(torch.linalg.svdvals(G))
    torch.testing.assert_close(M.matrix_participation_ratio(G), expected)
    assert float(M.matrix_participation_ratio(torch.zeros(shape))) == 0


def test_planted_rank_is_read_off_the_reconstruction_error() -> None:
    S = torch.cat([torch.linspace(5, 1, 6), torch.full((10,), 1e-4)])
    W = with_spectrum(20, 16, S).float()
    d = decompose(W)
    assert compute_reconstruction_error(W, d.U, d.S, d.V, 6) < 0.01
    assert compute_reconstruction_error(W, d.U, d.S, d.V, 5) > 0.05
    for r in (0, 3, 6, 16):
        expected = math.sqrt(float(S[r:].square().sum() / S.square().sum()))
        assert compute_reconstruction_error(W, d.U, d.S, d.V, r) == pytest.approx(expected, abs=1e-6)
    zero = torch.zeros(4, 4)
    d = decompose(zero)
    assert compute_reconstruction_error(zero, d.U, d.S, d.V, 2) == 0.0


def test_aligned_and_orthogonal_gradients() -> None:
    d = decompose(gaussian(20, 16).float())
    k, r = 4, 12
    inside = d.U[:, :k] @ gaussian(k, 16, seed=1).float()
    beyond = d.U[:, k:] @ gaussian(12, 16, seed=2).float()
    outside = gaussian(20, 16, seed=3).float()
    outside -= d.U @ (d.U.mT @ outside)  # m > g: not in the basis at all
    assert compute_gradient_alignment(inside, d.U, d.S, r) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert compute_gradient_alignment(beyond, d.U, d.S, r) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert compute_gradient_alignment(outside, d.U, d.S, r) == pytest.approx((0.0, 1.0), abs=1e-6)
    mixed = 3 * inside / inside.norm() + 4 * beyond / beyond.norm()
    assert compute_gradient_alignment(mixed, d.U, d.S, r) == pytest.approx((9 / 25, 16 / 25), abs=1e-6)
    assert compute_gradient_alignment(torch.zeros(20, 16), d.U, d.S, r) == pytest.approx((4 / 20, 16 / 20))
    with pytest.raises(ValueError, match="r counts minor"):
        compute_gradient_alignment(inside, d.U, d.S, 17)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 15))
@settings(max_examples=30, deadline=None)
def test_random_gradients_sit_at_chance(seed: int, k: int) -> None:
    """With 64 columns the share of an isotropic gradient stays within 5 standard deviations of k / m."""
    m, n = 16, 64
    U, S = orthonormal(m, m, seed), torch.ones(m)
    principal, minor = compute_gradient_alignment(gaussian(m, n, seed=seed + 1), U, S, m - k)
    f = k / m
    sd = math.sqrt(2 * f * (1 - f) / (m * n + 2))
    assert principal + minor == pytest.approx(1)
    assert abs(principal - f) < 5 * sd


@pytest.mark.parametrize("shape", [(10, 10), (14, 9), (9, 14)])
@pytest.mark.parametrize("k", [0, 3, 9])
def test_block_energies_against_full_bases(shape: tuple[int, int], k: int) -> None:
    m, n = shape
    g = min(m, n)
    full = torch.linalg.svd(gaussian(m, n), full_matrices=True)
    dW = gaussian(m, n, seed=5)
    D = (full.U.mT @ dW @ full.Vh.mT).square()
    cuts = {"p": slice(0, k), "m": slice(k, g), "o": slice(g, None)}
    got = M.block_energies(dW, full.U[:, :g], full.Vh.mT[:, :g], k)
    for rows in "pmo":
        for columns in "pmo":
            if rows + columns != "oo":
                expected = float(D[cuts[rows], cuts[columns]].sum())
                assert float(getattr(got, rows + columns)) == pytest.approx(expected, abs=1e-9), rows + columns
    assert float(got.total) == pytest.approx(float(dW.square().sum()))


def test_principal_diagonal_is_the_first_order_change_of_s() -> None:
    W, dW = gaussian(8, 6), 1e-6 * gaussian(8, 6, seed=1)
    d = decompose(W)
    change = torch.linalg.svdvals(W + dW) - torch.linalg.svdvals(W)
    torch.testing.assert_close(M.principal_diagonal(dW, d.U, d.V, 6), change, atol=1e-10, rtol=0)


def test_relative_gap() -> None:
    assert float(M.relative_gap(torch.tensor([4.0, 3.0, 1.0]), 2)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="gap needs"):
        M.relative_gap(torch.ones(3), 3)


@pytest.mark.parametrize("k", [1, 3, 40, 300])
def test_largest_eigenvalue_by_products_alone(k: int) -> None:
    """The way of a GPU: never too small, and at most k^(1/1024) too large."""
    X = gaussian(2, 2 * k, k).float() * torch.tensor([1e-6, 1e6])[:, None, None]
    M_ = X.mT @ X
    bound, exact = M._trace_power_bound(M_, 10), torch.linalg.eigvalsh(M_.double())[..., -1]
    assert torch.all(bound >= 0.9999 * exact)
    assert torch.all(bound <= 1.0001 * k ** (1 / 1024) * exact)
    torch.testing.assert_close(M.largest_eigenvalue_bound(M_).double(), exact, rtol=1e-4, atol=0)
