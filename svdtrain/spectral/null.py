"""What chance predicts for each metric, so that a number can be read as evidence.

Every function works on tensors with leading batch dimensions and never waits for the device, except those that return
Python values (`wedin_bound`, the Marchenko-Pastur constants, which depend on shapes only).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdtrain.spectral.metrics import safe_ratio, squared_norm

_MEDIAN_GRID = 20_001
_INTRUDER_COSINE = 0.5
_LEAST_DEVIATION = 1e-4  # of chance
_RESOLUTION = 1e-9  # of a sum of squared sines between float32 bases

# --- shares -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evidence:
    """A share beside its chance level: lift = share / chance, z = (share - chance) / sd under an isotropic null."""

    share: Tensor
    chance: Tensor
    lift: Tensor
    z: Tensor


def share_deviation(chance: Tensor, m: int, participation: Tensor) -> Tensor:
    """Standard deviation of the principal share of G when its m-dimensional singular vectors point anywhere, [...].

    Var = 2 f (1 - f) / (m + 2) * (m / PR - 1) / (m - 1), exact for Haar-distributed vectors: each squared projection
    is Beta(k/2, (m-k)/2), and orthogonality makes any two of them correlate by -1/(m-1). For PR << m it is the usual
    2 f (1 - f) / ((m + 2) PR); for a flat spectrum (a Muon update) the share is fixed by the shape and the spread is 0.
    """
    if m == 1:
        return torch.zeros_like(chance)
    single = 2 * chance * (1 - chance) / (m + 2)
    return (single * (m / participation.clamp_min(1) - 1).clamp_min(0) / (m - 1)).sqrt()


def share_evidence(share: Tensor, k: Tensor | int, m: int, participation: Tensor) -> Evidence:
    """Lift and z of a one-sided share of an m x n matrix with k of m directions, all [...].

    `participation` is PR = (sum g_i^2)^2 / sum g_i^4 of the matrix whose share it is. Where k is 0 or m the share is
    certain: lift 1 and z 0. A smaller spread than 1e-4 of chance counts as that: a flat spectrum is known to rounding.
    """
    chance = torch.as_tensor(k, device=share.device, dtype=share.dtype).expand_as(share) / m
    deviation = share_deviation(chance, m, participation.to(share.dtype)).clamp_min(_LEAST_DEVIATION * chance)
    certain = (chance <= 0) | (chance >= 1)
    z = torch.where(certain, torch.zeros_like(share), safe_ratio(share - chance, deviation))
    lift = torch.where(chance > 0, safe_ratio(share, chance), torch.ones_like(share))
    return Evidence(share, chance, lift, z)


def share_lift_and_z(
    share: NDArray[np.float64], k: NDArray[np.int64], m: NDArray[np.int64], participation: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lift and z of `share_evidence` for numbers that are on the host, all [b]; each has its own m."""
    certain = (k <= 0) | (k >= m)
    chance = k / m
    inside = np.where(certain, 0.5, chance)
    single = 2 * inside * (1 - inside) / (m + 2)
    spread = np.maximum(m / np.maximum(participation, 1) - 1, 0) / np.maximum(m - 1, 1)
    deviation = np.maximum(np.sqrt(single * spread), _LEAST_DEVIATION * inside)
    z = np.where(certain, 0.0, (share - chance) / deviation)
    return np.where(k > 0, share / np.where(k > 0, chance, 1.0), 1.0), z


# --- rotation ---------------------------------------------------------------------------------------------------------


def update_variance(dW: Tensor) -> Tensor:
    """tau^2 = ||dW||_F^2 / (m n), [...]: the variance per entry of an isotropic update of the same size."""
    return squared_norm(dW) / (dW.shape[-2] * dW.shape[-1])


def rotation_null(S: Tensor, k: Tensor | int, tau_squared: Tensor, m: int, max_k: int | None = None) -> Tensor:
    """Expected ||sin Theta||_F^2 of the top-k left subspace under an isotropic update of variance tau^2, [...].

    tau^2 sum_{i<=k<j} (s_i^2 + s_j^2) / ((s_i^2 - s_j^2)^2 + tau^2 (s_i^2 + s_j^2)), first order, j up to m and s_j = 0
    outside the basis; never above k (1 - k/m), the value for an unrelated subspace. S [..., g] holds all singular
    values before the update; k may differ over the batch, `max_k` (default g) then bounds it without a device wait.
    """
    g = S.shape[-1]
    S = S if S.dtype == torch.float64 else S.float()
    limit = g if max_k is None and isinstance(k, Tensor) else (max_k if isinstance(k, Tensor) else k)
    assert limit is not None
    cut = torch.as_tensor(k, device=S.device).expand(S.shape[:-1])[..., None]
    # In units of s_1, so that neither huge nor tiny weights leave the number range.
    scale = S[..., :1].clamp_min(torch.finfo(S.dtype).tiny)
    energy = (S / scale).square()
    tau = (tau_squared.to(S.dtype)[..., None, None] / scale.unsqueeze(-1)).div(scale.unsqueeze(-1))
    top = energy[..., :limit, None]
    total, difference = top + energy[..., None, :], top - energy[..., None, :]
    spread = tau * total
    terms = safe_ratio(spread, difference.square() + spread)
    index = torch.arange(g, device=S.device)
    pairs = (index[:limit, None] < cut[..., None]) & (index >= cut[..., None])
    expected = (terms * pairs).sum((-2, -1))
    if m > g:  # otherwise no direction lies outside
        spread = tau * top
        outside = (m - g) * safe_ratio(spread, top.square() + spread)[..., 0]
        expected = expected + (outside * (index[:limit] < cut)).sum(-1)
    unrelated = cut[..., 0] * (1 - cut[..., 0] / m)
    return torch.minimum(expected, unrelated.to(expected.dtype))


def rotation_ratio(sin_squared: Tensor, expected: Tensor) -> Tensor:
    """rho = ||sin Theta||_F^2 / E_null, [...]. About 1: explained by size and gap; much larger: directed.

    Both get 1e-9 added, what float32 bases can resolve, so two analyses of an unchanged matrix give 1.
    """
    return (sin_squared.to(expected.dtype) + _RESOLUTION) / (expected + _RESOLUTION)


def wedin_bound(update_norm: float, S: Tensor, k: int, S_after: Tensor | None = None) -> float | None:
    """Upper bound of the sine of the largest angle, or None: no gap, nothing can be said.

    ||dW||_2 / (s_k(after) - s_{k+1}(before)) (Wedin 1972). Without the later spectrum s_k(after) is taken at its least
    value, s_k - ||dW||_2 (Weyl). `update_norm` is the spectral norm of the update (the Frobenius norm also bounds).
    """
    if not 0 < k < S.shape[-1]:
        raise ValueError(f"a gap needs 0 < k < {S.shape[-1]}, got {k}")
    upper = float(S[k - 1]) - update_norm if S_after is None else float(S_after[k - 1])
    gap = upper - float(S[k])
    if gap <= 0 or update_norm >= gap:
        return None
    return update_norm / gap


# --- where the noise ends ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _median_eigenvalue(beta: float) -> float:
    """Median of the Marchenko-Pastur law with ratio beta in (0, 1] and unit variance."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = mid + half * cos(t) takes the square roots at both edges out of the integrand.
    t = torch.linspace(math.pi, 0, _MEDIAN_GRID, dtype=torch.float64, device="cpu")
    x = (low + high) / 2 + (high - low) / 2 * torch.cos(t)
    density = torch.sin(t).square() / x.clamp_min(1e-300)
    density[x <= 0] = 2 / ((high - low) / 2)  # limit at x = 0, only for beta = 1
    mass = torch.cat([t.new_zeros(1), ((density[1:] + density[:-1]) / 2 * -t.diff()).cumsum(0)])
    return float(x[int(torch.searchsorted(mass, mass[-1] / 2))])


def _shape_ratio(m: int, n: int) -> tuple[float, int]:
    return min(m, n) / max(m, n), max(m, n)


def noise_scale(S: Tensor, m: int, n: int) -> Tensor:
    """Standard deviation of the noise entries, from the median singular value (Gavish and Donoho 2014), [...]."""
    beta, longer = _shape_ratio(m, n)
    return S.double().median(-1).values / math.sqrt(longer * _median_eigenvalue(beta))


def marchenko_pastur_edge(S: Tensor, m: int, n: int) -> Tensor:
    """Largest singular value that noise alone reaches: sigma (sqrt m + sqrt n), sigma from the median, [...]."""
    return noise_scale(S, m, n) * (math.sqrt(m) + math.sqrt(n))


def gavish_donoho_threshold(S: Tensor, m: int, n: int) -> Tensor:
    """Optimal hard threshold for unknown noise, 2.858 x median s if square (Gavish and Donoho 2014), [...]."""
    return noise_scale(S, m, n) * _threshold_over_noise(m, n)


def _threshold_over_noise(m: int, n: int) -> float:
    beta, longer = _shape_ratio(m, n)
    best = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return best * math.sqrt(longer)


def signal_rank(S: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Number of singular values above the Marchenko-Pastur edge and above Gavish-Donoho, each int64 [...].

    Lower bounds of the signal rank: trained weights hold signal inside the bulk too.
    """
    noise = noise_scale(S, m, n).unsqueeze(-1)
    return S.gt(noise * (math.sqrt(m) + math.sqrt(n))).sum(-1), S.gt(noise * _threshold_over_noise(m, n)).sum(-1)


# --- what moved where -------------------------------------------------------------------------------------------------


def intruder_directions(U_old: Tensor, U_new: Tensor, k: int, cosine: float = _INTRUDER_COSINE) -> Tensor:
    """Which of the new top-k left vectors resemble no old one (|cos| < `cosine` to all of them), bool [..., k].

    U_old [..., m, >=k], better wider than k: a vector that only swapped places is not an intruder (Shuttleworth et
    al. 2024). Inside the bulk vectors mix freely, so read it above the noise edge only.
    """
    similarity = (U_old.mT @ U_new[..., :k]).abs().amax(-2)
    return similarity < cosine


def factor_drift(B: Tensor, A: Tensor, U_k: Tensor, V_k: Tensor) -> tuple[Tensor, Tensor]:
    """Energy share of B [m, r] in the protected left and of A [r, n] in the protected right space, each [...].

    Both are 0 right after a split into minor directions; chance is k/m and k/n.
    """
    drift_B = safe_ratio(squared_norm(U_k.mT @ B.to(U_k.dtype)), squared_norm(B))
    drift_A = safe_ratio(squared_norm(A.to(V_k.dtype) @ V_k), squared_norm(A))
    return drift_B, drift_A


@dataclass(frozen=True, eq=False)
class FunctionalDrift:
    """tr(dW C dW^T) / tr(W C W^T) on reference inputs, its value for an isotropic dW of equal norm, and the ratio."""

    value: Tensor
    chance: Tensor
    lift: Tensor


def functional_drift(dW: Tensor, W: Tensor, C: Tensor) -> FunctionalDrift:
    """How much of the layer's output on the reference inputs an update changes, relative, all [...].

    dW, W [..., m, n]; C [..., n, n] = E[x x^T]. E tr(dW C dW^T) = ||dW||_F^2 tr(C) / n for an isotropic dW.
    """
    C = C.to(torch.promote_types(W.dtype, torch.float32))
    dW, W = dW.to(C.dtype), W.to(C.dtype)
    changed, whole = ((dW @ C) * dW).sum((-2, -1)), ((W @ C) * W).sum((-2, -1))
    isotropic = squared_norm(dW) * C.diagonal(dim1=-2, dim2=-1).sum(-1) / C.shape[-1]
    return FunctionalDrift(
        value=safe_ratio(changed, whole), chance=safe_ratio(isotropic, whole), lift=safe_ratio(changed, isotropic)
    )
