import subprocess
import sys

import pytest
import torch

from svdtrain.spectral import metrics as M
from svdtrain.spectral import subspace as Q
from svdtrain.spectral.decompose import decompose_many
from tests.spectral.reference import gaussian, orthonormal

torch.set_num_threads(1)
SIZE = 96


def trained(seed: int, m: int = SIZE, n: int = SIZE) -> torch.Tensor:
    """Noise with a decaying signal of 12 directions: a spectrum like that of a trained matrix."""
    signal = (orthonormal(m, 12, seed) * torch.linspace(6, 2.5, 12).double()) @ orthonormal(n, 12, seed + 1).mT
    return gaussian(m, n, seed=seed + 2) / max(m, n) ** 0.5 + signal


def warm_case(m: int, n: int, width: int, size: float, num: int = 3):
    """Matrices after an update of relative size `size`, their old bases, and their exact new ones."""
    before = [trained(seed, m, n) for seed in range(num)]
    after = []
    for seed, W in enumerate(before):
        dW = gaussian(m, n, seed=seed + 50)
        after.append((W + size * W.norm() / dW.norm() * dW).float())
    old = decompose_many([W.float() for W in before])
    U, S = torch.stack([d.U[:, :width] for d in old]), torch.stack([d.S[:width] for d in old])
    V = torch.stack([d.V[:, :width] for d in old])
    return torch.stack(after), U, S, V, decompose_many(after)


@pytest.mark.parametrize(("m", "n"), [(SIZE, SIZE), (SIZE, 48), (48, SIZE)])
@pytest.mark.parametrize("way", Q.RITZ_WAYS)
def test_one_warm_step_finds_the_new_subspace(way: Q.RitzWay, m: int, n: int) -> None:
    k, width = 12, 36
    W, U, S, V, exact = warm_case(m, n, width, 0.02)
    got = Q.warm_step(W, U, S, V, way=way, cut=torch.tensor([k, k, k]))
    assert got.ok.all()
    eye = torch.eye(width)
    for basis in (got.U, got.V):
        torch.testing.assert_close(basis.mT @ basis, eye.expand(3, -1, -1), atol=2e-5, rtol=0)
    assert torch.all(got.S[:, :-1] >= got.S[:, 1:])
    for i, truth in enumerate(exact):
        moved = float(M.subspace_angle(U[i], truth.U, k))
        error = float(M.subspace_angle(got.U[i], truth.U, k))
        assert error < 0.01 < moved
        torch.testing.assert_close(got.S[i, :k], truth.S[:k], atol=2e-3 * float(truth.S[0]), rtol=0)
    if way != "none":
        assert torch.all(got.residual < 0.5 * got.staleness)


@pytest.mark.parametrize("way", ["refine", "hybrid"])
def test_ways_round_eigh_agree_with_it_in_the_bulk(way: Q.RitzWay) -> None:
    """k = 40 cuts where neighbouring values differ by less than the update moved them."""
    W, U, S, V, _ = warm_case(SIZE, SIZE, 72, 0.01)
    reference, got = (Q.warm_step(W, U, S, V, way=w) for w in ("eigh", way))
    tolerance = {"refine": 2e-2, "hybrid": 1e-3}[way]
    assert float(M.sin_theta_squared(reference.U[..., :40], got.U[..., :40]).max()) < tolerance
    torch.testing.assert_close(got.S, reference.S, rtol=1e-3, atol=0)


def test_threads_work_after_the_main_one_has_ended() -> None:
    """As an analysis does that a short script leaves behind; an executor refuses new work then."""
    program = """
import time, torch
from svdtrain.spectral.subspace import ritz_rotation
from svdtrain.spectral.worker import Worker

def late():
    time.sleep(0.3)
    print(tuple(ritz_rotation(torch.eye(4).expand(3, 4, 4), "cpu").shape))

Worker(torch.device("cpu"), beside=True).submit(late)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "(3, 4, 4)"


@pytest.mark.parametrize("size", [1, 2, 5, 16, 31, 32, 33, 47, 64, 81])
@pytest.mark.parametrize("way", ["refine", "hybrid"])
def test_rotations_are_orthogonal_and_reduce_the_off_diagonal(way: Q.RitzWay, size: int) -> None:
    E = 0.002 * gaussian(2, size, size, seed=size).float()
    H = torch.diag_embed(torch.linspace(4, 1, size)) + E + E.mT
    P = Q.ritz_rotation(H, way)
    torch.testing.assert_close(P.mT @ P, torch.eye(size).expand(2, -1, -1), atol=1e-5, rtol=0)

    def off(X: torch.Tensor) -> float:
        return float((X - torch.diag_embed(X.diagonal(dim1=-2, dim2=-1))).norm())

    assert off(P.mT @ H @ P) <= 0.2 * off(H) + 1e-6


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scale_does_not_matter(scale: float) -> None:
    W, U, S, V, _ = warm_case(SIZE, SIZE, 36, 0.02)
    plain = Q.warm_step(W, U, S, V, way="eigh")
    scaled = Q.warm_step(W * scale, U, S * scale, V, way="eigh")
    assert scaled.ok.all()
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-4, atol=0)
    assert float(M.sin_theta_squared(scaled.U[..., :12], plain.U[..., :12]).max()) < 1e-6


@pytest.mark.parametrize("broken", ["nan", "zero", "rank_deficient"])
def test_a_matrix_that_fails_keeps_its_basis_and_spoils_no_other(broken: str) -> None:
    W, U, S, V, _ = warm_case(SIZE, SIZE, 36, 0.02)
    alone = Q.warm_step(W[2:], U[2:], S[2:], V[2:], way="refine")
    if broken == "nan":
        W[1, 3, 4] = float("nan")
    else:
        W[1] = 0 if broken == "zero" else trained(9)[:, :5].float() @ torch.ones(5, SIZE)
    got = Q.warm_step(W, U, S, V, way="refine")
    assert got.ok.tolist() == [True, False, True]
    assert torch.equal(got.U[1], U[1])
    assert torch.equal(got.V[1], V[1])
    assert torch.equal(got.S[1], S[1])
    torch.testing.assert_close(got.S[2:], alone.S)


def test_cholesky_qr_keeps_the_order_of_nested_subspaces() -> None:
    Y = gaussian(2, 30, 8).float() * torch.logspace(0, -6, 8)
    basis, ok = Q.cholesky_qr2(Y)
    reference = torch.linalg.qr(Y.double()).Q
    assert ok.all()
    for k in (1, 4, 8):
        assert float(M.sin_theta_squared(reference[..., :k], basis[..., :k].double()).max()) < 1e-9


def test_staleness_is_zero_only_for_this_matrix() -> None:
    W, U, S, V, _ = warm_case(SIZE, SIZE, 24, 0.0)
    cut = torch.tensor([12, 3, 0])
    assert float(Q.staleness_of(W, U, S, V, cut).max()) < 1e-5
    assert float(Q.offdiagonal_share(W, V).max()) < 1e-4
    leaked = W + 0.5 * (torch.eye(SIZE) - U @ U.mT) @ gaussian(SIZE, SIZE).float() @ (V @ V.mT) / SIZE**0.5
    assert float(Q.staleness_of(leaked, U, S, V, cut)[:2].min()) > 0.01
    scaled = Q.staleness_of(1.1 * W, U, S, V, cut)  # the off-diagonal alone would not see this
    torch.testing.assert_close(scaled, torch.tensor([0.1, 0.1, 0.0]), atol=1e-4, rtol=0)
    assert float(Q.offdiagonal_share(1.1 * W, V).max()) < 1e-4


@pytest.mark.parametrize("outlier", [0.0, 4.0, 60.0])
@pytest.mark.parametrize(("m", "n"), [(SIZE, SIZE), (SIZE, 3 * SIZE)])
def test_filtered_steps_follow_a_large_move_of_a_flat_spectrum(m: int, n: int, outlier: float) -> None:
    W0 = torch.stack([gaussian(m, n, seed=seed) for seed in range(3)]).float() / m**0.5
    old = decompose_many(list(W0))
    for i, part in enumerate(old):
        W0[i] += outlier * torch.outer(part.U[:, 0], part.V[:, 0])
    U, S, V = (torch.stack([getattr(part, field) for part in decompose_many(list(W0))]) for field in "USV")
    W = W0 + 0.1 * torch.stack([gaussian(m, n, seed=10 + seed) for seed in range(3)]).float() / m**0.5
    W[2] = W0[2]  # needs no second step
    width, cut = SIZE // 4, torch.full((3,), SIZE // 16)

    def residual(iterations: int) -> torch.Tensor:
        basis = U[..., :width], S[:, :width], V[..., :width]
        step = Q.warm_steps(W, *basis, way="eigh", cut=cut, tolerance=1e-3, max_iterations=iterations)
        exact = decompose_many(list(W))
        if iterations > 1:
            for i, truth in enumerate(exact):
                torch.testing.assert_close(step.S[i, : SIZE // 16], truth.S[: SIZE // 16], rtol=1e-4, atol=0)
        assert step.ok.all()
        return step.residual

    assert (residual(1)[:2] > 1e-3).all()
    assert (residual(3) < 1e-3).all()


def test_degree_grows_as_the_spectrum_flattens() -> None:
    tops = (1.0, 1.5, 3.0, 50.0, 1e4, float("inf"))
    degrees = [Q._largest_degree(top) for top in tops]
    assert degrees == sorted(degrees, reverse=True)
    assert (degrees[0], degrees[-1]) == (8, 1)
