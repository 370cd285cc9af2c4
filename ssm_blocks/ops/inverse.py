"""Inverses that structure makes cheap: unit lower triangular, and diagonal plus low rank."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def solve_unit_lower(L: Tensor, X: Tensor) -> Tensor:
    """(I + L)^{-1} X for strictly lower triangular L [..., C, C], X [..., C, D]; entries of L above are ignored."""
    return torch.linalg.solve_triangular(L, X, upper=False, unitriangular=True)


def invert_unit_lower(L: Tensor, method: str = "solve") -> Tensor:
    """(I + L)^{-1} for strictly lower triangular L [..., C, C].

    method: solve (forward substitution), block (`block_inverse`) or neumann (`neumann_inverse`, may be refused).
    Raises ValueError for other names.
    """
    if method not in INVERSES:
        raise ValueError(f"the inverse of a chunk is one of {sorted(INVERSES)}, got {method!r}")
    return INVERSES[method](L)


def _identity_like(L: Tensor) -> Tensor:
    return torch.eye(L.size(-1), dtype=L.dtype, device=L.device).expand_as(L)


def _solve_inverse(L: Tensor) -> Tensor:
    return solve_unit_lower(L, _identity_like(L))


def block_inverse(L: Tensor, smallest: int = 16) -> Tensor:
    """(I + L)^{-1} by halves: [[A, 0], [C, B]]^{-1} = [[A', 0], [-B' C A', B']]; solves blocks of <= `smallest`.

    Mostly matrix products, which is what matrix units want, and as stable as substitution. All blocks of a size go at
    once; sizes that do not halve evenly down to `smallest` are solved whole.
    """
    n = L.size(-1)
    count = n // smallest
    if n % smallest or count & (count - 1) or count < 2:
        return _solve_inverse(L)
    inverse, size = _solve_inverse(_diagonal_blocks(L, smallest)), smallest
    while size < n:
        A, B = inverse.unflatten(-3, (-1, 2)).unbind(-3)  # neighbours on the diagonal
        C = -B @ _diagonal_blocks(L, 2 * size)[..., size:, :size] @ A
        upper = torch.cat([A, torch.zeros_like(C)], -1)
        inverse, size = torch.cat([upper, torch.cat([C, B], -1)], -2), 2 * size
    return inverse.squeeze(-3)


def _diagonal_blocks(L: Tensor, size: int) -> Tensor:
    """[..., n, n] -> [..., n / size, size, size]."""
    blocks = L.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [..., rows, size, columns, size]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def neumann_inverse(L: Tensor, tolerance: float | None = None) -> Tensor:
    """(I + L)^{-1} = (I - L)(I + L^2)(I + L^4)...: exact on paper since L is nilpotent, log2 C products.

    In floating point the powers of L grow before they vanish: on equal keys with beta = 2 the result is off by 1e11
    and more in float32. So the residual is measured, and where it exceeds `tolerance` (default: 1e3 eps) a warning
    says so and substitution takes over.
    """
    identity = _identity_like(L)
    inverse, power, covered = identity - L, L, 2
    while covered < L.size(-1):
        power = power @ power
        inverse = inverse + power @ inverse
        covered *= 2
    limit = 1e3 * torch.finfo(L.dtype).eps if tolerance is None else tolerance
    residual = (inverse + L @ inverse - identity).detach().abs().amax()
    if not residual <= limit:  # also catches NaN
        warnings.warn(f"Neumann inverse off by {residual:.1e}, solving the triangular system instead", stacklevel=2)
        return _solve_inverse(L)
    return inverse


INVERSES = {"solve": _solve_inverse, "block": block_inverse, "neumann": neumann_inverse}


def woodbury_solve(d: Tensor, U: Tensor, V: Tensor, X: Tensor) -> Tensor:
    """(diag(d) + U V^*)^{-1} X for d [..., n], U, V [..., n, r], X [..., n, m], with one r x r solve."""
    X, U = X / d.unsqueeze(-1), U / d.unsqueeze(-1)
    small = torch.eye(U.size(-1), dtype=U.dtype, device=U.device) + V.mH @ U
    return X - U @ torch.linalg.solve(small, V.mH @ X)
