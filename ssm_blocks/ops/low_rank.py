"""Tools on low-rank matrices P Q^*: truncation, projection on a tangent space, traces by random probes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def truncate(P: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation P' Q'^* of P Q^*, balanced: P' = U S^1/2, Q' = V S^1/2.

    P, Q [n, r]; two thin QRs and one r x r SVD, never n x n. Raises ValueError unless 0 <= rank <= r.
    """
    if not 0 <= rank <= P.size(-1):
        raise ValueError(f"the rank after truncation must be within 0..{P.size(-1)}, got {rank}")
    (Qp, Rp), (Qq, Rq) = torch.linalg.qr(P), torch.linalg.qr(Q)
    U, S, Vh = torch.linalg.svd(Rp @ Rq.mH)
    root = S[..., :rank].sqrt().unsqueeze(-2)
    return Qp @ U[..., :rank] * root, Qq @ Vh.mH[..., :rank] * root


def tangent_project(Z: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Orthogonal projection of Z [n, m] on {U A^* + B V^*}, the tangent space of rank-r matrices at U S V^*.

    U [n, r], V [m, r] orthonormal. P Z = U U^* Z + Z V V^* - U U^* Z V V^* (Vandereycken 2013, eq. 2.5).
    """
    UZ, ZV = U @ (U.mH @ Z), (Z @ V) @ V.mH
    return UZ + ZV - U @ (U.mH @ ZV)


def tangent_project_diagonal(Z: Tensor, U: Tensor, V: Tensor, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Orthogonal projection of square Z [n, n] on diagonal plus tangent space: (diagonal [n], tangent part [n, n]).

    The two spaces are not orthogonal to each other, so alternate: each takes what the other leaves (block Gauss-Seidel
    on the least-squares problem; converges linearly with the squared cosine of the angle between them).
    """
    diagonal = torch.zeros_like(Z.diagonal(dim1=-2, dim2=-1))
    tangent = torch.zeros_like(Z)
    for _ in range(iterations):
        diagonal = (Z - tangent).diagonal(dim1=-2, dim2=-1)
        tangent = tangent_project(Z - torch.diag_embed(diagonal), U, V)
    return diagonal, tangent


def hutchinson_trace(
    apply: Callable[[Tensor], Tensor], n: int, num_probes: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Unbiased samples z^T A z of tr A, [num_probes], for random signs z (Hutchinson 1990); `apply` maps [n, m]."""
    z = torch.randint(0, 2, (n, num_probes), generator=generator, device=generator.device).to(dtype) * 2 - 1
    return (z * apply(z)).sum(0)


def largest_remainder(weights: list[float], budget: int, minimum: int = 0, maximum: int | None = None) -> list[int]:
    """Whole shares of `budget` in proportion to `weights`, each within [minimum, maximum], that sum to it exactly.

    Everybody starts at the minimum. Whoever's proportional part of the rest reaches the maximum gets the maximum, and
    the others share what is left, by Hamilton's method of largest remainders. Ties go to the earlier entry. Raises
    ValueError when the budget is out of range or a weight is negative or not finite.
    """
    count = len(weights)
    cap = budget if maximum is None else maximum
    if not all(0 <= w < float("inf") for w in weights):
        raise ValueError(f"weights must be finite and not negative, got {weights}")
    if not all(isinstance(x, int) for x in (budget, minimum, cap)) or minimum < 0:
        raise ValueError(
            f"budget, minimum and maximum are whole numbers of at least 0, got {budget!r}, {minimum!r}, {cap!r}"
        )
    if not count * minimum <= budget <= count * cap:
        raise ValueError(
            f"a budget of {budget} over {count} shares of {minimum}..{cap} each: must be within "
            f"{count * minimum}..{count * cap}"
        )
    shares = [minimum] * count
    open_ = list(range(count))
    rest = budget - count * minimum
    while open_:
        quota = _quotas([weights[i] for i in open_], rest)
        full = {i for i, share in zip(open_, quota, strict=True) if share >= cap - minimum}
        if not full:
            break
        for i in full:
            shares[i] = cap
        rest -= len(full) * (cap - minimum)
        open_ = [i for i in open_ if i not in full]
    for i, extra in zip(open_, _round(quota, rest) if open_ else [], strict=True):
        shares[i] += extra
    return shares


def _quotas(weights: list[float], rest: int) -> list[Fraction]:
    """`rest` in proportion to the weights; equally if they are all zero. Exact: a sum of floats may overflow."""
    exact = [Fraction(float(w)) for w in weights]
    total = sum(exact)
    return [rest * (w / total if total else Fraction(1, len(exact))) for w in exact]


def _round(quota: list[Fraction], rest: int) -> list[int]:
    """Whole numbers that sum to `rest`: whole parts first, then one each by size of the remainder."""
    whole = [int(share) for share in quota]
    by_remainder = sorted(range(len(quota)), key=lambda i: (whole[i] - quota[i], i))
    for i in by_remainder[: rest - sum(whole)]:
        whole[i] += 1
    return whole
