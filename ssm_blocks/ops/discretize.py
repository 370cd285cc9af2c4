"""From h' = A h + B u to h_t = Ad h_{t-1} + Bd u_t, and the Cauchy kernel that evaluates such systems."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear(A: Tensor, B: Tensor, dt: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Dense A [..., n, n], B [..., n, m]: Ad = (I - dt/2 A)^{-1} (I + dt/2 A), Bd = (I - dt/2 A)^{-1} dt B.

    Maps the left half-plane into the unit disk; if A + A^* <= 0 then ||Ad|| <= 1.
    """
    identity = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
    both = torch.cat([identity + dt / 2 * A, dt * B], -1)
    Ad, Bd = torch.linalg.solve(identity - dt / 2 * A, both).split([A.size(-1), B.size(-1)], -1)
    return Ad, Bd


def bilinear_diagonal(a: Tensor, dt: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The same for diagonal A = diag(a), a [..., n]: (Ad, factor on B), both [..., n]."""
    denominator = 1 - dt / 2 * a
    return (1 + dt / 2 * a) / denominator, dt / denominator


def zoh(a: Tensor, dt: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Zero-order hold for diagonal A = diag(a), a [..., n]: (exp(dt a), (exp(dt a) - 1) / a), with dt where a = 0."""
    z = torch.as_tensor(dt * a)
    small = z.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(z), z)
    ratio = torch.where(small, 1 + z / 2 + z * z / 6, _expm1(safe) / safe)
    return z.exp(), dt * ratio


def _expm1(z: Tensor) -> Tensor:
    return z.exp() - 1 if z.is_complex() else torch.expm1(z)


def cauchy(weights: Tensor, poles: Tensor, points: Tensor) -> Tensor:
    """sum_n weights_n / (z - poles_n) at every z: weights, poles [..., n], points [m] -> [..., m].

    Source: Gu, Goel and Re 2022 (arXiv:2111.00396), section 3.
    """
    return (cauchy_matrix(poles, points) @ weights.unsqueeze(-1)).squeeze(-1)


def cauchy_matrix(poles: Tensor, points: Tensor) -> Tensor:
    """1 / (z_m - poles_n) as [..., m, n]: one matrix for all weights on the same poles."""
    return 1 / (points.unsqueeze(-1) - poles.unsqueeze(-2))
