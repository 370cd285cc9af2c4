"""What one analysis reports, against constructions with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svdtrain.adaptive.analysis import History, decompose_all, measure, starting_rank
from svdtrain.spectral.decompose import decompose

M, N, K = 40, 30, 10
R = N - K


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed: int = 0) -> Tensor:
    """K strong directions over a bulk, with a clear gap."""
    U, _ = torch.linalg.qr(random(M, K, seed=seed))
    V, _ = torch.linalg.qr(random(N, K, seed=seed + 1))
    return 20 * U @ V.T + 0.1 * random(M, N, seed=seed + 2)


def test_gradient_in_the_principal_space_and_at_random() -> None:
    W = planted()
    D = decompose(W)
    aligned = measure(W, D.U[:, :K] @ random(K, N, seed=5), D, None, r=R, r_min=4)
    assert aligned.principal_alignment == pytest.approx(1, abs=1e-5)
    assert aligned.gradient_lift == pytest.approx(M / K, rel=1e-4)
    assert aligned.gradient_z > 20
    chance = [measure(W, random(M, N, seed=s), D, None, r=R, r_min=4) for s in range(40)]
    assert sum(m.gradient_lift for m in chance) / 40 == pytest.approx(1, abs=0.03)
    zs = torch.tensor([m.gradient_z for m in chance])
    assert abs(float(zs.mean())) < 0.6
    assert 0.6 < float(zs.std()) < 1.5
    opposite = measure(W, D.U[:, K:] @ random(R, N, seed=5), D, None, r=R, r_min=4)
    assert opposite.gradient_lift == pytest.approx(0, abs=1e-5)
    assert opposite.minor_alignment == pytest.approx(1, abs=1e-5)


def test_history_gives_the_applied_update() -> None:
    W = planted()
    history = History.of(W, decompose(W), R)
    dW = 0.01 * random(M, N, seed=9)
    G = random(M, N, seed=3)
    after = W + dW
    m = measure(after, G, decompose(after), history, r=R, r_min=4)
    assert m.update_size == pytest.approx(float(dW.norm() / after.norm()), rel=1e-4)
    assert 0.6 < m.update_lift < 1.4
    assert 0.5 < m.rotation_ratio < 2  # an isotropic update explains its own rotation
    assert 0 < m.subspace_angle < 0.1
    U = decompose(W).U
    after = W + 0.05 * torch.outer(U[:, K], U[:, 0]) @ W  # turns one strong direction on purpose, and nothing else
    m = measure(after, G, decompose(after), history, r=R, r_min=4)
    assert m.rotation_ratio == pytest.approx(M * N / (K * (M - K)), rel=0.1)  # the largest value there is
    assert m.update_lift < 0.1


def test_without_history_or_gradient_there_is_no_number() -> None:
    W = planted()
    m = measure(W, torch.zeros(M, N), decompose(W), None, r=R, r_min=4)
    for name in ("subspace_angle", "rotation_ratio", "update_size", "update_lift", "gradient_lift", "gradient_z"):
        assert math.isnan(getattr(m, name)), name
    unchanged = measure(W, random(M, N, seed=0), decompose(W), History.of(W, decompose(W), R), r=R, r_min=4)
    assert unchanged.update_size == 0
    assert math.isnan(unchanged.update_lift)


def test_minor_energy_and_reconstruction() -> None:
    W = planted()
    S = torch.linalg.svdvals(W.double()).square()
    m = measure(W, random(M, N, seed=0), decompose(W), None, r=R, r_min=4)
    assert m.minor_energy == pytest.approx(float(S[-R:].sum() / S.sum()), rel=1e-4)
    assert m.reconstruction_error == pytest.approx(float((S[R:].sum() / S.sum()).sqrt()), rel=1e-4)


def test_one_bad_matrix_does_not_spoil_the_others() -> None:
    bad = planted()
    bad[0, 0] = float("nan")
    first, second, third = decompose_all([planted(), bad, planted(7)])
    assert isinstance(second, str)
    assert "not finite" in second
    assert not isinstance(first, str)
    assert not isinstance(third, str)


@pytest.mark.parametrize(("rank", "r_min", "expected"), [(20, 4, 10), (20, 15, 15), (5, 4, 4), (20, 50, 19)])
def test_starting_rank(rank: int, r_min: int, expected: int) -> None:
    S = torch.zeros(20)
    S[:rank] = 1
    assert starting_rank(S, r_min) == expected
