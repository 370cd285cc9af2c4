"""The mathematics of Muon as pure functions on stacks of equally shaped matrices [K, m, n].

One update is: Nesterov momentum, row equilibration, polar factor, renormalisation, variance reduction, and decay only
where it agrees with the update.
"""

# pyright: reportPrivateImportUsage=false
# (the torch._foreach functions are private by name only: torch's own optimizers are built on them)

from __future__ import annotations

import torch
from torch import Tensor

# Quintic polynomials a x + b x^3 + c x^5 that drive singular values in (0, 1] towards 1: the optimal schedule for five
# steps with safety factor 2e-2 and cushion 2, from "The Polar Express" (arXiv:2505.16932).
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
GRAM_STEPS = 3
Coefficients = tuple[tuple[float, float, float], ...]


def nesterov_momentum(grads: list[Tensor], buffers: list[Tensor], momentum: float) -> list[Tensor]:
    """Move each buffer towards its gradient in place and return gradient and buffer blended: the look-ahead.

    buffer <- momentum buffer + (1 - momentum) G; returns (1 - momentum) G + momentum buffer. The gradients are kept.
    """
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    return list(torch._foreach_lerp(grads, buffers, momentum))


def equilibrate_rows(X: Tensor) -> Tensor:
    """Scale every row of X [..., m, n] to the root mean square row norm (MuonEq, arXiv:2603.28254)."""
    row_norms = torch.linalg.vector_norm(_precise(X), dim=-1, keepdim=True)
    target = torch.linalg.vector_norm(row_norms, dim=-2, keepdim=True) / X.size(-2) ** 0.5
    return X * (target / row_norms.clamp_min(1e-6)).to(X.dtype)


def polar_express(X: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor U V^T of X = U S V^T, X [..., m, n], in X's own type.

    Singular values above 1.1e-3 ||X||_F end within 14.2 % of 1, smaller ones below (arXiv:2505.16932).
    Raises ValueError when steps is not 1 to 5.
    """
    if not 1 <= steps <= len(POLAR_EXPRESS_COEFFICIENTS):
        raise ValueError(
            f"polar_express has coefficients for 1 to {len(POLAR_EXPRESS_COEFFICIENTS)} steps, not {steps}"
        )
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    short, long = sorted(X.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    coefficients = POLAR_EXPRESS_COEFFICIENTS[:steps]
    # The Gram form needs a third fewer operations on long matrices, but more digits than bf16 has.
    iterate = _iterate_gram if long >= 2 * short and X.dtype in (torch.float32, torch.float64) else _iterate
    Y = iterate(X.mT if tall else X, coefficients)
    return Y.mT if tall else Y


def _iterate(X: Tensor, coefficients: Coefficients) -> Tensor:
    """X <- (a I + b X X^T + c (X X^T)^2) X for each (a, b, c)."""
    for a, b, c in coefficients:
        gram = X @ X.mT
        X = _baddbmm(X, _baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a, alpha=1.0)
    return X


def _iterate_gram(X: Tensor, coefficients: Coefficients) -> Tensor:
    """The same on m x m matrices only: all factors P = a I + b A + c A^2 are polynomials of A = X X^T and commute.

    The product of the P is applied to X after GRAM_STEPS steps, and A is formed anew: carried further, A would lose
    the small singular values to rounding.
    """
    for first in range(0, len(coefficients), GRAM_STEPS):
        gram = X @ X.mT
        P = product = _polynomial(gram, *coefficients[first])
        for coefficient in coefficients[first + 1 : first + GRAM_STEPS]:
            gram = P @ gram @ P
            P = _polynomial(gram, *coefficient)
            product = P @ product
        X = product @ X
    return X


def _polynomial(A: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b A + c A^2."""
    P = _baddbmm(A, A, A, beta=b, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def _baddbmm(input: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """beta input + alpha left @ right, for matrices or stacks of them."""
    if input.dim() == 2:
        return torch.addmm(input, left, right, beta=beta, alpha=alpha)
    return torch.baddbmm(input, left, right, beta=beta, alpha=alpha)


def renormalize(X: Tensor) -> Tensor:
    """Scale X [..., m, n] to the Frobenius norm of an exact polar factor, min(m, n)^1/2 (Muon+, arXiv:2602.21545)."""
    norm = torch.linalg.vector_norm(_precise(X), dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    return X * (min(X.shape[-2:]) ** 0.5 / norm).to(X.dtype)


def second_momentum_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the factored second moment of an m x n matrix: one number per line of the longer side."""
    m, n = shape
    return (m, 1) if m >= n else (1, n)


def reduce_variance(X: Tensor, second_momentum: Tensor, beta2: float) -> Tensor:
    """Divide each row (m >= n) or column of X by its running RMS, keeping ||X||_F (NorMuon, arXiv:2510.05491).

    X [..., m, n]; second_momentum [..., m, 1] or [..., 1, n] is moved in place towards the mean squares of X.
    """
    dim = -1 if second_momentum.size(-1) == 1 and X.size(-2) >= X.size(-1) else -2
    mean_square = _precise(X).square().mean(dim=dim, keepdim=True)
    second_momentum.lerp_(mean_square.to(second_momentum.dtype), 1 - beta2)
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    scaled_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return X * (scale * (norm / scaled_norm.clamp_min(1e-10))).to(X.dtype)


def apply_update(W: Tensor, U: Tensor, lr: float, weight_decay: float) -> Tensor:
    """W - lr U - lr weight_decay W where U and W share a sign (cautious decay, arXiv:2411.16085); W, U [..., m, n]."""
    if weight_decay == 0:
        return W - lr * U
    decay = torch.where(U * W >= 0, W, 0)
    return torch.add(W, U, alpha=-lr).sub_(decay, alpha=lr * weight_decay)


def shape_scale(shape: torch.Size) -> float:
    """Factor on the learning rate of an m x n matrix: (m/n)^1/2 where it is tall, else 1."""
    return max(1.0, shape[-2] / shape[-1]) ** 0.5


def orthogonalized_update(
    G: Tensor, second_momentum: Tensor, *, beta2: float, steps: int, polar_dtype: torch.dtype | None = None
) -> Tensor:
    """From look-ahead gradients G [K, m, n] to the update before the learning rate; moves second_momentum in place.

    polar_dtype: type of equilibration and polar iteration; None takes G's own.
    """
    X = polar_express(equilibrate_rows(G.to(polar_dtype or G.dtype)), steps).to(G.dtype)
    return reduce_variance(renormalize(X), second_momentum, beta2)


def _precise(X: Tensor) -> Tensor:
    """X in at least fp32, for norms."""
    return X if X.dtype == torch.float64 else X.float()
