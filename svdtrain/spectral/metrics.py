"""What one decomposition, one gradient or one update says about a matrix.

The four `compute_*` functions return Python floats and are the ones of the original design. Each has a twin without
the prefix that returns tensors, works on leading batch dimensions and never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SQUARINGS_PER_SCALING = 3  # a trace of 1 leaves an eigenvalue of 1/k, and k^-8 is far from float32's end
_SQUARINGS = 10  # largest eigenvalue from tr(M^1024): at most 0.6 % too large at 512 directions


def squared_norm(X: Tensor) -> Tensor:
    """||X||_F^2 over the last two dimensions, in at least float32."""
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(X, dim=(-2, -1), dtype=dtype).square()


def safe_ratio(numerator: Tensor, denominator: Tensor, otherwise: float = 0.0) -> Tensor:
    """numerator / denominator, and `otherwise` where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, otherwise)


# --- angles between subspaces -----------------------------------------------------------------------------------------


def projection_residual(U1: Tensor, U2: Tensor) -> Tensor:
    """(I - U1 U1^T) U2, [..., m, k]: its singular values are the sines of the principal angles.

    Sines from the residual keep their relative accuracy for small angles; sqrt(1 - cos^2) does not.
    """
    return U2 - U1 @ (U1.mT @ U2)


def subspace_angle(U1: Tensor, U2: Tensor, k: int) -> Tensor:
    """Largest principal angle between span(U1[:, :k]) and span(U2[:, :k]), radians, [...]; float64 inside.

    Both [..., m, >=k] with orthonormal columns. Exact: one k x k eigenvalue problem (Bjorck and Golub 1973).
    """
    _check_directions(k, U1, U2)
    if k == 0:
        return U1.new_zeros(U1.shape[:-2], dtype=torch.float64)
    R = projection_residual(U1[..., :k].double(), U2[..., :k].double())
    largest = torch.linalg.eigvalsh(R.mT @ R)[..., -1]
    return largest.clamp(0, 1).sqrt().asin()


def subspace_angle_bound(U1: Tensor, U2: Tensor) -> Tensor:
    """Upper bound of the largest principal angle, radians, [...], by matrix products alone (no eigenvalue problem).

    Uses lambda_max <= tr(M^p)^(1/p) <= k^(1/p) lambda_max with p = 1024, so it is at most 0.6 % too large at k = 512.
    """
    R = projection_residual(U1, U2)
    M = R.mT @ R
    largest = largest_eigenvalue_bound(M)
    return largest.clamp(0, 1).sqrt().asin()


def largest_eigenvalue_bound(M: Tensor, squarings: int = _SQUARINGS) -> Tensor:
    """Upper bound of the largest eigenvalue of positive semi-definite M [..., k, k], at most k^(1/p) too large.

    tr(M^p)^(1/p) with p = 2^squarings. On the CPU, where an eigenvalue problem costs less than ten products, exact.
    """
    if not M.is_cuda:
        return torch.linalg.eigvalsh(torch.nan_to_num(M))[..., -1]
    return _trace_power_bound(M, squarings)


def _trace_power_bound(M: Tensor, squarings: int) -> Tensor:
    tiny = torch.finfo(M.dtype).tiny
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)
    log_scale = trace.log()
    M = M / trace[..., None, None]
    for done in range(1, squarings + 1):
        M = M @ M
        last = done == squarings
        if last or done % _SQUARINGS_PER_SCALING == 0:  # keeps the powers inside the number range
            trace = M.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)
            log_scale = torch.add(log_scale, trace.log(), alpha=0.5**done)
            M = M if last else M / trace[..., None, None]
    return log_scale.exp()


def sin_theta_squared(U1: Tensor, U2: Tensor) -> Tensor:
    """||sin Theta||_F^2, the sum of squared sines of all principal angles, [...]."""
    return squared_norm(projection_residual(U1, U2))


def compute_subspace_angle(U1: Tensor, U2: Tensor, k: int) -> float:
    """Largest principal angle between the two top-k left subspaces, radians. See `subspace_angle`."""
    return float(subspace_angle(U1, U2, k))


# --- the spectrum -----------------------------------------------------------------------------------------------------


def directions_for_energy(S: Tensor, share: float) -> Tensor:
    """Smallest number of leading directions that hold `share` of the energy sum s_i^2; int64 [...], 0 for S = 0."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of energy must lie in (0, 1], e.g. 0.9 for 90 %; got {share}")
    cumulative = S.double().square().cumsum(-1)
    total = cumulative[..., -1:]
    below = (cumulative < share * total * (1 - 1e-12)).sum(-1)  # tolerate the rounding of the cumulative sum
    return (below + 1).mul_(total[..., 0] > 0)


def singular_value_concentration(S: Tensor, percentile: float) -> Tensor:
    """Share of the directions needed for the share `percentile` (0..1) of the energy, [...]."""
    return directions_for_energy(S, percentile).double() / S.shape[-1]


def compute_singular_value_concentration(S: Tensor, percentile: float = 0.9) -> float:
    """Share of the directions needed for the share `percentile` (0..1) of the energy. Small: concentrated."""
    return float(singular_value_concentration(S, percentile))


def stable_rank(S: Tensor) -> Tensor:
    """sum s_i^2 / s_1^2, [...]: how many directions as strong as the first. 0 for S = 0."""
    S = S.double()
    return safe_ratio(S.square().sum(-1), S[..., 0].square())


def entropy_rank(S: Tensor) -> Tensor:
    """exp of the entropy of s_i / sum s, [...] (effective rank of Roy and Vetterli 2007). 0 for S = 0."""
    S = S.double()
    total = S.sum(-1)
    p = safe_ratio(S, total.unsqueeze(-1).expand_as(S))
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def participation_ratio(S: Tensor) -> Tensor:
    """(sum s_i^2)^2 / sum s_i^4, [...]: the number of directions that share the energy. 0 for S = 0."""
    energy = S.double().square()
    energy = safe_ratio(energy, energy.amax(-1, keepdim=True).expand_as(energy))  # s^4 may leave the number range
    return safe_ratio(energy.sum(-1).square(), energy.square().sum(-1))


def matrix_participation_ratio(G: Tensor) -> Tensor:
    """Participation ratio of G [..., m, n] without its SVD: ||G||_F^4 / ||G G^T||_F^2, [...]. 0 for G = 0."""
    norm = squared_norm(G).sqrt()
    scaled = G.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)[..., None, None]
    gram = scaled @ scaled.mT if G.shape[-2] <= G.shape[-1] else scaled.mT @ scaled
    return safe_ratio(torch.ones_like(norm), squared_norm(gram))


def relative_gap(S: Tensor, k: int) -> Tensor:
    """(s_k - s_{k+1}) / s_1, [...]: below about 1e-3 the top-k subspace is not a stable thing to talk about."""
    if not 0 < k < S.shape[-1]:
        raise ValueError(f"a gap needs 0 < k < {S.shape[-1]}, got {k}")
    return safe_ratio(S[..., k - 1] - S[..., k], S[..., 0])


# --- approximation ----------------------------------------------------------------------------------------------------


def reconstruction_error(W: Tensor, U: Tensor, S: Tensor, V: Tensor, r: int) -> Tensor:
    """||W - U_r S_r V_r^T||_F / ||W||_F with the r *leading* directions, [...]; 0 for W = 0.

    U [..., m, >=r], S [..., >=r], V [..., n, >=r] (columns). With a stale basis this also counts the staleness.
    """
    _check_directions(r, U, V)
    W = W.to(S.dtype)
    rest = W - (U[..., :r] * S[..., None, :r]) @ V[..., :r].mT
    return safe_ratio(squared_norm(rest), squared_norm(W)).sqrt()


def compute_reconstruction_error(W: Tensor, U: Tensor, S: Tensor, V: Tensor, r: int) -> float:
    """Relative Frobenius error of the best rank-r approximation of W; under 0.01 compressing to rank r is safe."""
    return float(reconstruction_error(W, U, S, V, r))


# --- gradients and updates --------------------------------------------------------------------------------------------


def principal_share(G: Tensor, U: Tensor, k: int) -> Tensor:
    """||U_k^T G||_F^2 / ||G||_F^2, [...]. Chance (k / m) for G = 0: no gradient is no evidence either way."""
    _check_directions(k, U)
    share = safe_ratio(squared_norm(U[..., :k].mT @ G.to(U.dtype)), squared_norm(G), otherwise=k / U.shape[-2])
    return share.clamp(0, 1)


def gradient_alignment(grad_W: Tensor, U: Tensor, S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Principal and minor share of ||G||_F^2 over W's left directions, each [...]; k = g - r are principal.

    The shares sum to 1. For m > g the part of G outside span(U) is not principal, so it counts as minor.
    """
    g = S.shape[-1]
    if not 0 <= r <= g:
        raise ValueError(f"r counts minor directions and must lie in [0, {g}], got {r}")
    share = principal_share(grad_W, U, g - r)
    return share, 1 - share


def compute_gradient_alignment(grad_W: Tensor, U: Tensor, S: Tensor, r: int) -> tuple[float, float]:
    """(principal share, minor share) of ||G||_F^2: the clobbering detector. See `gradient_alignment`."""
    principal, minor = gradient_alignment(grad_W, U, S, r)
    return float(principal), float(minor)


@dataclass(frozen=True, eq=False)
class BlockEnergies:
    """Energy of an update over the blocks of W's basis, each [...]; first letter left (rows), second right (columns).

    p: principal, m: the rest of the basis, o: outside the basis (only for m > g on the left or n > g on the right).
    They sum to ||dW||_F^2. pp rescales or erases, pm and mp rotate, mm is free.
    """

    pp: Tensor
    pm: Tensor
    mp: Tensor
    mm: Tensor
    po: Tensor
    mo: Tensor
    op: Tensor
    om: Tensor

    @property
    def total(self) -> Tensor:
        """||dW||_F^2."""
        return self.pp + self.pm + self.mp + self.mm + self.po + self.mo + self.op + self.om


def block_energies(dW: Tensor, U: Tensor, V: Tensor, k: int) -> BlockEnergies:
    """Block energies of D = U^T dW V for a full basis U [..., m, g], V [..., n, g] with k principal directions."""
    _check_directions(k, U, V)
    dW = dW.to(U.dtype)
    left, right = U.mT @ dW, dW @ V  # [g, n], [m, g]
    D = left @ V
    principal_rows, minor_rows = squared_norm(D[..., :k, :]), squared_norm(D[..., k:, :])
    pp, mp = squared_norm(D[..., :k, :k]), squared_norm(D[..., k:, :k])
    pm, mm = squared_norm(D[..., :k, k:]), squared_norm(D[..., k:, k:])
    zero = torch.zeros_like(pp)
    rows_full, columns_full = U.shape[-1] == U.shape[-2], V.shape[-1] == V.shape[-2]
    return BlockEnergies(
        pp=pp, pm=pm, mp=mp, mm=mm,
        po=zero if columns_full else (squared_norm(left[..., :k, :]) - principal_rows).clamp_min(0),
        mo=zero if columns_full else (squared_norm(left[..., k:, :]) - minor_rows).clamp_min(0),
        op=zero if rows_full else (squared_norm(right[..., :k]) - pp - mp).clamp_min(0),
        om=zero if rows_full else (squared_norm(right[..., k:]) - pm - mm).clamp_min(0),
    )  # fmt: skip


def principal_diagonal(dW: Tensor, U: Tensor, V: Tensor, k: int) -> Tensor:
    """u_i^T dW v_i for i <= k, [..., k]: the first-order change of s_i; negative means erasure."""
    _check_directions(k, U, V)
    return ((dW.to(U.dtype) @ V[..., :k]) * U[..., :k]).sum(-2)


def _check_directions(k: int, *bases: Tensor) -> None:
    smallest = min(basis.shape[-1] for basis in bases)
    if not 0 <= k <= smallest:
        raise ValueError(f"{k} directions asked for, but the basis holds {smallest}")
