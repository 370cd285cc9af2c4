"""Every null against a Monte Carlo of what it claims to predict."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdtrain.spectral import metrics as M
from svdtrain.spectral import null as N
from tests.spectral.reference import gaussian, orthonormal, with_spectrum

torch.set_num_threads(1)


def haar(num: int, m: int, seed: int) -> torch.Tensor:
    Q, R = torch.linalg.qr(gaussian(num, m, m, seed=seed))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@pytest.mark.parametrize("spectrum", ["flat", "gaussian", "one", "decaying"])
@pytest.mark.parametrize(("m", "k"), [(12, 3), (24, 20)])
def test_spread_of_the_share_is_the_monte_carlo_spread(spectrum: str, m: int, k: int) -> None:
    g = {
        "flat": torch.ones(m),
        "gaussian": torch.linalg.svdvals(gaussian(m, m)),
        "one": torch.eye(m)[0],
        "decaying": 0.7 ** torch.arange(m),
    }[spectrum].double()
    G = haar(1500, m, seed=1) * g  # right vectors do not matter for a left share
    shares = G[:, :k].square().sum((1, 2)) / g.square().sum()
    participation = M.participation_ratio(g)
    f = torch.tensor(k / m, dtype=torch.float64)
    expected = float(N.share_deviation(f, m, participation))
    assert float(shares.mean()) == pytest.approx(k / m, abs=5 * expected / math.sqrt(1500) + 1e-9)
    assert float(shares.std()) == pytest.approx(expected, rel=0.1, abs=1e-9)


def test_spread_matches_the_usual_formula_for_few_directions() -> None:
    f, m = torch.tensor(0.25, dtype=torch.float64), 1000
    usual = math.sqrt(2 * 0.25 * 0.75 / ((m + 2) * 5))
    assert float(N.share_deviation(f, m, torch.tensor(5.0))) == pytest.approx(usual, rel=0.01)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 31))
@settings(max_examples=25, deadline=None)
def test_z_of_random_gradients_is_standard(seed: int, k: int) -> None:
    G, U = gaussian(200, 32, 20, seed=seed), orthonormal(32, 32, seed + 1)
    evidence = N.share_evidence(M.principal_share(G, U, k), k, 32, M.matrix_participation_ratio(G))
    assert abs(float(evidence.z.mean())) < 5 / math.sqrt(200)
    assert 0.75 < float(evidence.z.std()) < 1.3
    assert float(evidence.lift.mean()) == pytest.approx(1, abs=0.2)


def test_z_sees_a_planted_alignment_and_certain_shares_are_not_evidence() -> None:
    U = orthonormal(32, 32)
    G = gaussian(32, 20) + 4 * U[:, :4] @ gaussian(4, 20, seed=2)
    evidence = N.share_evidence(M.principal_share(G, U, 4), 4, 32, M.matrix_participation_ratio(G))
    assert float(evidence.z) > 8
    assert float(evidence.lift) > 3
    for k in (0, 32):
        certain = N.share_evidence(M.principal_share(G, U, k), k, 32, M.matrix_participation_ratio(G))
        assert (float(certain.z), float(certain.lift)) == (0, 1)
    muon = orthonormal(32, 32, seed=3)
    flat = N.share_evidence(M.principal_share(muon, U, 4), 4, 32, M.matrix_participation_ratio(muon))
    assert abs(float(flat.z)) < 0.1  # fixed by the shape, not a finding


@given(share=st.floats(0, 1), k=st.integers(0, 20), m=st.integers(20, 40), participation=st.floats(1, 40))
def test_host_form_of_lift_and_z(share: float, k: int, m: int, participation: float) -> None:
    both = N.share_evidence(torch.tensor(share, dtype=torch.float64), k, m, torch.tensor(participation))
    expected = float(both.lift), float(both.z)
    found = N.share_lift_and_z(*(np.array([value]) for value in (share, k, m, participation)))
    assert [float(column[0]) for column in found] == pytest.approx(expected, rel=1e-4, abs=1e-9)


SPIKED = torch.cat([torch.linspace(12, 8, 5), torch.linspace(4, 0.5, 19)]).double()


def monte_carlo_rotation(S: torch.Tensor, m: int, n: int, k: int, tau: float, trials: int = 120) -> float:
    W = torch.zeros(m, n, dtype=torch.float64)
    W.diagonal()[:] = S
    U = torch.linalg.svd(W + tau * gaussian(trials, m, n, seed=4)).U[..., :k]
    return float((k - U[:, :k].square().sum((1, 2))).mean())


@pytest.mark.parametrize(("m", "n"), [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_rotation_null_where_there_is_a_gap(m: int, n: int, tau: float) -> None:
    expected = float(N.rotation_null(SPIKED, 5, torch.tensor(tau**2), m))
    # For n > g the update also leaks through the right side into the left only at second order.
    assert monte_carlo_rotation(SPIKED, m, n, 5, tau) == pytest.approx(expected, rel=0.1)


def test_rotation_null_inside_the_bulk_is_the_right_size() -> None:
    S = torch.linalg.svdvals(gaussian(40, 40))
    tau = 0.03
    measured = monte_carlo_rotation(S, 40, 40, 20, tau)
    expected = float(N.rotation_null(S, 20, torch.tensor(tau**2), 40))
    assert 0.5 < measured / expected < 2
    # and the largest angle alone would have cried wolf:
    W = torch.diag(S)
    U = torch.linalg.svd(W + tau * gaussian(40, 40, seed=9)).U
    assert float(M.subspace_angle(torch.eye(40, dtype=torch.float64), U, 20)) > 0.1


def test_rotation_null_batches_over_different_cuts_and_scales() -> None:
    S = torch.stack([SPIKED, SPIKED.flip(0).sort(descending=True).values * 1e-30, SPIKED * 1e18])
    tau = torch.tensor([1e-2, 1e-62, 1e34], dtype=torch.float64)
    cuts = torch.tensor([5, 3, 0])
    together = N.rotation_null(S, cuts, tau, 30, max_k=6)
    alone = [float(N.rotation_null(S[i], int(cuts[i]), tau[i], 30)) for i in range(3)]
    assert together.tolist() == pytest.approx(alone)
    assert alone[2] == 0
    assert float(N.rotation_null(SPIKED, 5, torch.tensor(1e9), 24)) == pytest.approx(5 * (1 - 5 / 24))


def test_rho_separates_directed_from_undirected_updates() -> None:
    W = with_spectrum(24, 24, SPIKED)
    U, S, Vh = torch.linalg.svd(W)
    directed = U[:, 5:10] @ gaussian(5, 5, seed=1) @ Vh[:5]  # turns principal left vectors into the minor space
    for update, low, high in [(gaussian(24, 24, seed=2), 0.5, 2.0), (directed, 5.0, math.inf)]:
        update = 0.5 * update / update.norm()
        after = torch.linalg.svd(W + update).U
        expected = N.rotation_null(S, 5, N.update_variance(update), 24)
        assert low < float(N.rotation_ratio(M.sin_theta_squared(U[:, :5], after[:, :5]), expected)) < high
    zero = torch.zeros(())
    assert float(N.rotation_ratio(zero, zero)) == 1
    assert float(N.rotation_ratio(zero + 1e-3, zero)) > 1e5
    assert float(N.rotation_ratio(zero + 1e-11, zero)) == pytest.approx(1, abs=0.1)  # rounding is not a rotation


@given(seed=st.integers(0, 10_000), size=st.floats(1e-3, 3.0), k=st.integers(1, 23))
@settings(max_examples=40, deadline=None)
def test_wedin_never_lies(seed: int, size: float, k: int) -> None:
    W = with_spectrum(24, 24, SPIKED, seed)
    dW = gaussian(24, 24, seed=seed + 5)
    dW *= size / torch.linalg.matrix_norm(dW, 2)
    before, after = torch.linalg.svd(W), torch.linalg.svd(W + dW)
    angle = float(M.subspace_angle(before.U, after.U, k))
    for later in (None, after.S):
        bound = N.wedin_bound(size, before.S, k, later)
        assert bound is None or (bound < 1 and math.sin(angle) <= bound + 1e-7)


def test_wedin_says_when_there_is_no_gap() -> None:
    assert N.wedin_bound(0.1, torch.tensor([3.0, 1.0, 0.99]), 1) == pytest.approx(0.1 / 1.9, rel=1e-5)
    assert N.wedin_bound(0.1, torch.tensor([3.0, 1.0, 0.99]), 2) is None


def test_noise_edge_constants() -> None:
    S = torch.tensor([3.0, 1.0, 0.5])
    assert float(N.gavish_donoho_threshold(S, 100, 100)) == pytest.approx(2.858, abs=2e-3)
    assert float(N.gavish_donoho_threshold(S, 50, 100)) == pytest.approx(2.1711, abs=2e-3)  # table IV of the paper: 0.5
    assert float(N.gavish_donoho_threshold(S, 100, 50)) == float(N.gavish_donoho_threshold(S, 50, 100))


@pytest.mark.parametrize("shape", [(200, 200), (100, 300), (300, 100)])
def test_noise_scale_and_planted_signal(shape: tuple[int, int]) -> None:
    m, n = shape
    noise = 0.3 * gaussian(m, n, seed=1)
    S = torch.linalg.svdvals(noise)
    assert float(N.noise_scale(S, m, n)) == pytest.approx(0.3, rel=0.03)
    assert float(S[0]) == pytest.approx(float(N.marchenko_pastur_edge(S, m, n)), rel=0.05)
    assert int(N.signal_rank(S, m, n)[1]) == 0
    planted = noise + with_spectrum(m, n, torch.tensor([60.0, 50.0, 40.0, 30.0]), seed=2)
    edge, threshold = N.signal_rank(torch.linalg.svdvals(planted), m, n)
    assert int(threshold) == 4
    assert 4 <= int(edge) <= 6
    assert N.signal_rank(torch.stack([S, S]), m, n)[0].shape == (2,)


def test_intruders_are_new_directions_only() -> None:
    U, S = orthonormal(30, 10), torch.linspace(9, 3, 10).double()
    V = orthonormal(20, 10, seed=1)
    W = (U * S) @ V.mT
    spike = orthonormal(30, 1, seed=8)
    spike -= U @ (U.mT @ spike)
    right = orthonormal(20, 1, seed=9)
    right -= V @ (V.mT @ right)
    W_new = W + 20 * (spike / spike.norm()) @ (right / right.norm()).mT
    after = torch.linalg.svd(W_new).U
    assert N.intruder_directions(U, after, 4).tolist() == [True, False, False, False]
    swapped = torch.linalg.svd((U * S.flip(0)) @ V.mT).U  # the same directions in another order
    assert not N.intruder_directions(U, swapped, 10).any()


def test_factor_drift_is_zero_after_a_split_and_chance_for_noise() -> None:
    full = torch.linalg.svd(gaussian(20, 16), full_matrices=False)
    U, S, V, k = full.U, full.S, full.Vh.mT, 5
    B, A = U[:, k:] * S[k:].sqrt(), S[k:, None].sqrt() * V[:, k:].mT
    assert [float(x) for x in N.factor_drift(B, A, U[:, :k], V[:, :k])] == pytest.approx([0, 0], abs=1e-12)
    noise_B, noise_A = gaussian(400, 20, 8), gaussian(400, 8, 16, seed=1)
    drift_B, drift_A = N.factor_drift(noise_B, noise_A, U[:, :k], V[:, :k])
    assert float(drift_B.mean()) == pytest.approx(5 / 20, abs=0.01)
    assert float(drift_A.mean()) == pytest.approx(5 / 16, abs=0.01)
    assert [float(x) for x in N.factor_drift(U[:, :k], V[:, :k].mT, U[:, :k], V[:, :k])] == pytest.approx([1, 1])


def test_functional_drift_and_its_chance_level() -> None:
    X = gaussian(500, 12) * torch.linspace(3, 0.1, 12).double()
    C, W = X.mT @ X / 500, gaussian(7, 12, seed=1)
    dW = 0.01 * gaussian(7, 12, seed=2)
    got = N.functional_drift(dW, W, C)
    assert float(got.value) == pytest.approx(float((X @ dW.mT).square().sum() / (X @ W.mT).square().sum()))
    noise = gaussian(4000, 7, 12, seed=3)
    drifts = N.functional_drift(noise, W.expand(4000, 7, 12), C)
    assert float(drifts.lift.mean()) == pytest.approx(1, abs=0.02)
    assert float((drifts.value / drifts.chance - drifts.lift).abs().max()) < 1e-9
    quiet = torch.linalg.eigh(C).eigenvectors[:, :1]  # the direction that inputs use least
    assert float(N.functional_drift(gaussian(7, 1) @ quiet.mT, W, C).lift) < 0.02
    assert float(N.functional_drift(torch.zeros(7, 12), W, C).lift) == 0
