"""Orthogonal matrices from free parameters, and QR of tall matrices by a tree."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(X: Tensor) -> Tensor:
    """(X - X^*) / 2, the skew-Hermitian part of X [..., n, n]."""
    return (X - X.mH) / 2


def cayley(X: Tensor) -> Tensor:
    """(I - K)^{-1} (I + K) with K the skew part of X [..., n, n]: a rotation; every one without eigenvalue -1.

    Written as 2 (I - K)^{-1} - I, which cancels no large numbers.
    """
    K = skew(X)
    identity = torch.eye(K.size(-1), dtype=K.dtype, device=K.device)
    return 2 * torch.linalg.inv(identity - K) - identity


def scaled_cayley(X: Tensor, sign: Tensor) -> Tensor:
    """cayley(X) diag(sign) for sign [..., n] of +-1: with it every orthogonal matrix is reached.

    Source: Helfrich, Willmott and Ye 2018 (arXiv:1707.09520). A `sign` in [-1, 1] gives norm <= 1.
    """
    return cayley(X) * sign.unsqueeze(-2)


def orthonormal_columns(X: Tensor) -> Tensor:
    """Q of the QR decomposition of X [..., m, n] with R's diagonal positive, which makes it unique and smooth."""
    if X.is_cuda and X.dtype == torch.float32:  # QR there goes matrix by matrix
        return by_cholesky(X.double()).to(X.dtype)
    Q, R = torch.linalg.qr(X)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def by_cholesky(X: Tensor) -> Tensor:
    """The same Q for float64 X: X R^{-1} with R^T R = X^T X, twice, since once squares the condition number.

    Source: CholeskyQR2 (Yamamoto et al. 2015). All matrices at once, no copy to the host.
    """
    for _ in range(2):
        gram = X.mT @ X
        tiny = 1e-14 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # keeps a dependent column from ending in NaN
        gram = gram + tiny[..., None, None] * torch.eye(X.size(-1), dtype=X.dtype, device=X.device)
        R = torch.linalg.cholesky_ex(gram, upper=True).L
        X = torch.linalg.solve_triangular(R, X, upper=True, left=False)
    return X


def tsqr(X: Tensor, leaf: int = 64) -> tuple[Tensor, Tensor]:
    """X = Q R for tall X [..., m, n] by a binary tree of small QRs; R has a positive diagonal.

    Halves of the rows are decomposed on their own, then their stacked R factors (Demmel et al. 2012).
    """
    m, n = X.shape[-2:]
    if m <= max(leaf, 2 * n):
        Q = orthonormal_columns(X)
        return Q, (Q.mH @ X).triu()
    upper, lower = X.split([m // 2, m - m // 2], dim=-2)
    (Q1, R1), (Q2, R2) = tsqr(upper, leaf), tsqr(lower, leaf)
    stacked = torch.cat([R1, R2], -2)
    top = orthonormal_columns(stacked)
    split = R1.size(-2)
    Q = torch.cat([Q1 @ top[..., :split, :], Q2 @ top[..., split:, :]], -2)
    return Q, (top.mH @ stacked).triu()
