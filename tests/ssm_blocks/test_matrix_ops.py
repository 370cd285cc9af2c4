"""Structured-matrix tools against dense float64 linear algebra."""

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_blocks.ops.discretize import bilinear, bilinear_diagonal, cauchy, zoh
from ssm_blocks.ops.householder import householder_product, householder_product_reference
from ssm_blocks.ops.inverse import INVERSES, invert_unit_lower, neumann_inverse, woodbury_solve
from ssm_blocks.ops.low_rank import (
    hutchinson_trace,
    largest_remainder,
    tangent_project,
    tangent_project_diagonal,
    truncate,
)
from ssm_blocks.ops.lti import causal_convolution, krylov, lti_states, power_apply
from ssm_blocks.ops.orthogonal import by_cholesky, cayley, orthonormal_columns, scaled_cayley, tsqr

F64, C128 = torch.float64, torch.complex128


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize("m", [1, 3, 7])
def test_wy_form_equals_the_product(m: int) -> None:
    u, beta = torch.nn.functional.normalize(rand(2, m, 5), dim=-1), 2 * rand(2, m, seed=1).sigmoid()
    close(householder_product(u, beta), householder_product_reference(u, beta))
    explicit = torch.eye(5, dtype=F64)
    for i in range(m):
        explicit = (torch.eye(5, dtype=F64) - beta[0, i] * torch.outer(u[0, i], u[0, i])) @ explicit
    close(householder_product(u, beta)[0], explicit)


def test_wy_gradients() -> None:
    u, beta = rand(2, 3, 4).requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(householder_product, (u, beta))


@pytest.mark.parametrize("method", sorted(INVERSES))
@pytest.mark.parametrize("n", [1, 16, 40, 64])
def test_unit_lower_inverse(method: str, n: int) -> None:
    L = rand(2, n, n).tril(-1) / n
    close(invert_unit_lower(L, method), torch.linalg.inv(torch.eye(n, dtype=F64) + L))


def equal_keys(n: int, beta: float, dtype: torch.dtype) -> Tensor:
    return (beta * torch.ones(n, n, dtype=dtype)).tril(-1)


@pytest.mark.parametrize("method", ["solve", "block"])
def test_correlated_keys_do_not_hurt_the_default_inverses(method: str) -> None:
    L = equal_keys(64, 1.9, torch.float32)
    want = torch.linalg.inv(torch.eye(64, dtype=F64) + L.double())
    assert (invert_unit_lower(L, method).double() - want).abs().max() < 1e-3


def test_neumann_notices_correlated_keys() -> None:
    L = equal_keys(64, 2.0, torch.float32) + 1e-3 * rand(64, 64, dtype=torch.float32).tril(-1)
    with pytest.warns(UserWarning, match="Neumann inverse off"):
        guarded = neumann_inverse(L)
    close(guarded, invert_unit_lower(L, "solve"), atol=0)
    unguarded = neumann_inverse(L, tolerance=float("inf"))
    assert (unguarded - guarded).abs().max() > 1e3  # the trap is real


def test_unknown_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="neumann"):
        invert_unit_lower(torch.zeros(2, 2), "cholesky")


def test_woodbury() -> None:
    d, U, V = rand(3, 6, dtype=C128) + 3, rand(3, 6, 2, seed=1, dtype=C128), rand(3, 6, 2, seed=2, dtype=C128)
    X = rand(3, 6, 4, seed=3, dtype=C128)
    close(woodbury_solve(d, U, V, X), torch.linalg.solve(torch.diag_embed(d) + U @ V.mH, X))


@given(st.integers(0, 10_000), st.floats(0.01, 1e4))
@settings(max_examples=40, deadline=None)
def test_cayley_is_orthogonal(seed: int, scale: float) -> None:
    Q = cayley(scale * rand(5, 5, seed=seed))
    close(Q.mT @ Q, torch.eye(5, dtype=F64), atol=1e-9)
    sign = rand(5, seed=seed).tanh()
    assert torch.linalg.matrix_norm(scaled_cayley(scale * rand(5, 5, seed=seed), sign), 2) <= 1 + 1e-9


def test_signed_cayley_reaches_a_reflection() -> None:
    sign = torch.tensor([1.0, -1.0], dtype=F64)
    close(torch.linalg.det(scaled_cayley(rand(2, 2), sign)), torch.tensor(-1.0, dtype=F64))
    assert torch.linalg.det(cayley(rand(2, 2))) > 0


@pytest.mark.parametrize(("m", "n", "leaf"), [(5, 3, 64), (200, 4, 16), (37, 7, 8), (65, 1, 4)])
def test_tsqr(m: int, n: int, leaf: int) -> None:
    X = rand(2, m, n)
    Q, R = tsqr(X, leaf)
    close(Q @ R, X)
    close(Q.mT @ Q, torch.eye(n, dtype=F64).expand(2, n, n))
    close(Q, orthonormal_columns(X))  # unique, because R's diagonal is positive
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_bilinear_and_zoh() -> None:
    a = -rand(6).abs() + 1j * rand(6, seed=1)
    Ad, Bd = bilinear(torch.diag(a), torch.eye(6, dtype=C128), 0.3)
    diagonal, factor = bilinear_diagonal(a, 0.3)
    close(Ad, torch.diag(diagonal))
    close(Bd, torch.diag(factor))
    assert (diagonal.abs() <= 1).all()
    decay, gain = zoh(torch.cat([a, torch.tensor([0j, 1e-7j])]), 0.3)
    close(decay[:6], torch.matrix_exp(0.3 * torch.diag(a)).diagonal())
    close(gain[:6], (decay[:6] - 1) / a)
    close(gain[6:], torch.tensor([0.3 + 0j, 0.3 + 0.5 * 0.09 * 1e-7j], dtype=C128), atol=1e-15)


def test_cauchy() -> None:
    w, poles, z = rand(2, 5, dtype=C128), rand(2, 5, seed=1, dtype=C128), rand(7, seed=2, dtype=C128)
    want = torch.stack([sum(w[:, n] / (z[m] - poles[:, n]) for n in range(5)) for m in range(7)], -1)
    close(cauchy(w, poles, z), want)


def test_truncation_is_the_best_approximation() -> None:
    P, Q = rand(9, 4, dtype=C128), rand(9, 4, seed=1, dtype=C128)
    P2, Q2 = truncate(P, Q, 2)
    S = torch.linalg.svdvals(P @ Q.mH)
    close(torch.linalg.matrix_norm(P @ Q.mH - P2 @ Q2.mH), S[2:].norm())
    close(P2.mH @ P2, Q2.mH @ Q2)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        truncate(P, Q, 5)


def test_tangent_projection() -> None:
    U, V = orthonormal_columns(rand(6, 2)), orthonormal_columns(rand(6, 2, seed=1))
    Z = rand(6, 6, seed=2)
    projected = tangent_project(Z, U, V)
    close(tangent_project(projected, U, V), projected)
    member = U @ rand(2, 6, seed=3) + rand(6, 2, seed=4) @ V.mT
    close(((Z - projected) * member).sum(), torch.zeros((), dtype=F64))
    diagonal, tangent = tangent_project_diagonal(Z, U, V, iterations=2000)
    rest = Z - torch.diag(diagonal) - tangent
    close(rest.diagonal(), torch.zeros(6, dtype=F64), atol=1e-8)
    close((rest * member).sum(), torch.zeros((), dtype=F64), atol=1e-7)


def test_hutchinson_is_unbiased() -> None:
    A = rand(8, 8)
    samples = hutchinson_trace(lambda z: A @ z, 8, 20_000, torch.Generator().manual_seed(0), F64)
    standard_error = samples.std() / 20_000**0.5
    assert (samples.mean() - A.trace()).abs() < 4 * standard_error
    diagonal = hutchinson_trace(lambda z: A.diagonal()[:, None] * z, 8, 3, torch.Generator().manual_seed(0), F64)
    close(diagonal, A.trace().expand(3))  # no variance on a diagonal matrix


@given(
    st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=9),
    st.integers(0, 3),
    st.integers(0, 9),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_largest_remainder_spends_the_budget(
    weights: list[float], minimum: int, room: int, data: st.DataObject
) -> None:
    maximum = minimum + room
    budget = data.draw(st.integers(len(weights) * minimum, len(weights) * maximum))
    shares = largest_remainder(weights, budget, minimum, maximum)
    assert sum(shares) == budget
    assert all(minimum <= share <= maximum for share in shares)
    ranked = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(shares[a] <= shares[b] + 1 for a, b in pairwise(ranked))


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder([47, 16, 15.8, 12, 6.1, 3.1], 10) == [5, 2, 1, 1, 1, 0]  # Hamilton's textbook case
    assert largest_remainder([100, 1, 1], 8, minimum=1, maximum=4) == [4, 2, 2]
    with pytest.raises(ValueError, match=r"3\.\.12"):
        largest_remainder([1, 1, 1], 13, minimum=1, maximum=4)
    with pytest.raises(ValueError, match="finite"):
        largest_remainder([1, float("nan")], 2)


@pytest.mark.parametrize("T", [1, 2, 33])
def test_lti_forms(T: int) -> None:
    A, b, h0 = rand(3, 4, 4, dtype=C128) / 3, rand(2, T, 3, 4, seed=1, dtype=C128), rand(2, 3, 4, seed=2, dtype=C128)
    states, h = [], h0
    for t in range(T):
        h = (A @ h.unsqueeze(-1)).squeeze(-1) + b[:, t]
        states.append(h)
    close(lti_states(A, b, h0), torch.stack(states, 1))
    columns = krylov(A, h0[0], T)
    close(columns[:, -1], (torch.linalg.matrix_power(A, T - 1) @ h0[0].unsqueeze(-1)).squeeze(-1))
    exponents = torch.tensor([0, T])
    got = power_apply(A, h0.unsqueeze(2), exponents).squeeze(2)
    close(got[0], h0[0])
    close(got[1], (torch.linalg.matrix_power(A, T) @ h0[1].unsqueeze(-1)).squeeze(-1))


def test_causal_convolution() -> None:
    kernel, u = rand(9, 3), rand(2, 9, 3, seed=1)
    want = torch.stack([sum(kernel[j] * u[:, t - j] for j in range(t + 1)) for t in range(9)], 1)
    close(causal_convolution(kernel, u), want)


def test_no_warning_from_a_neumann_inverse_that_is_fine() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neumann_inverse(rand(16, 16).tril(-1) / 16)


def test_orthonormal_columns_by_cholesky_are_those_by_qr() -> None:
    """What a GPU runs, also for nearly dependent columns, values and gradients."""
    X = rand(3, 8, 4)
    X[2, :, 3] = X[2, :, 0] + 1e-3 * X[2, :, 3]
    X.requires_grad_()
    weight = rand(3, 8, 4, seed=2)
    got, want = by_cholesky(X), orthonormal_columns(X)
    close(got, want, 1e-7)
    gradients = [torch.autograd.grad((Q * weight).sum(), X)[0] for Q in (got, want)]
    close(*gradients, 1e-6 * gradients[1].abs().max().item())
    assert torch.isfinite(by_cholesky(torch.zeros(4, 2, dtype=torch.float64) + rand(4, 1))).all()
