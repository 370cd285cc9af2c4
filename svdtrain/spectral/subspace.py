"""Warm subspace iteration, batched, from matrix products and small triangular solves.

Nothing here waits for the device (on CUDA `eigh` does, so the Ritz ways `eigh` and `hybrid` do too). A matrix whose
Cholesky fails keeps its old basis and is reported in `ok`; the engine then asks for an exact decomposition.

The small eigenvalue problem of Rayleigh-Ritz is the expensive part on a GPU: batched eigh falls back to a loop above 32
(66 to 409 ms for 80 problems of 64 to 256). The basis is warm, so the small Gram matrix H is nearly diagonal, and three
ways round it exploit that:

* refine: rotate all pairs at once by the Jacobi angle, damped, and orthonormalise (in the spirit of Ogita and Aishima
  2018); products only;
* hybrid: neighbours in the spectrum, where angles are large, by exact eigh of overlapping 32 x 32 diagonal blocks;
  pairs far apart, where they are small, by `refine`;
* cpu: eigh on the CPU in a few threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from typing import Literal

import torch
from torch import Tensor

from svdtrain.spectral.metrics import safe_ratio, squared_norm

RitzWay = Literal["eigh", "refine", "hybrid", "cpu", "none"]
RITZ_WAYS: tuple[RitzWay, ...] = ("eigh", "refine", "hybrid", "cpu", "none")

_BLOCK = 32  # up to here batched eigh is one kernel on CUDA
_REFINE_SWEEPS = 3
_HYBRID_SWEEPS = 2
_CPU_THREADS = 8
_MAX_DEGREE = 8
_GROWTH = 1e3
_NEWTON_SCHULZ = 2  # steps that orthonormalise I + X after its norm was bounded


@dataclass(frozen=True, eq=False)
class WarmStep:
    """One warm iteration of a batch: U [b, m, l], S [b, l] descending, V [b, n, l].

    residual [b]: ||W V - U S||_F / ||S||_2 over the first `cut` columns given to `warm_step`, with the new basis;
    staleness [b]: the same with the old one, before the step; ok [b]: False where the old basis was kept.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    staleness: Tensor
    ok: Tensor
    WV: Tensor
    """W V with the new V, which the next iteration starts from."""


# --- orthonormal bases ------------------------------------------------------------------------------------------------


def cholesky_qr2(Y: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the columns of Y [..., m, l], in their order, and ok [...]: Cholesky-QR, twice.

    Columns are scaled to unit length first, so a graded but nearly orthogonal Y (what a warm iteration gives) is well
    conditioned. Where Cholesky fails ok is False and the columns are meaningless; where Y is not finite they are not
    either. `lengths` [..., l]: of the columns, where they are known.
    """
    if lengths is None:
        lengths = torch.linalg.vector_norm(Y, dim=-2)
    Q = Y / lengths.unsqueeze(-2).clamp_min(torch.finfo(Y.dtype).tiny)
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    Q, first = _cholesky_pass(Q, identity)
    Q, second = _cholesky_pass(Q, identity)
    return Q, first & second


def _cholesky_pass(Y: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    L, info = torch.linalg.cholesky_ex(Y.mT @ Y)
    ok = info == 0
    L = torch.where(ok[..., None, None], L, identity)
    # The inverse of a small well-conditioned triangle, then one product: faster than a solve with a tall right side.
    inverse = torch.linalg.solve_triangular(L, identity, upper=False)
    return Y @ inverse.mT, ok


def columns_beside(known: Tensor, count: int) -> Tensor:
    """Pseudo-random orthonormal columns [b, m, count], the same for every matrix as far as what is known of it allows:
    orthogonal to the orthonormal columns of `known` [b, m, s]. For bases that grow; iterations turn them."""
    generator = torch.Generator(known.device).manual_seed(known.shape[-1])
    like = {"dtype": known.dtype, "device": known.device}
    new = torch.randn(known.shape[-2], count, generator=generator, **like)
    # Without what is known already, which a filter would blow up until all new columns were parallel.
    new = new - known @ (known.mT @ new)
    Q, ok = cholesky_qr2(new)
    return Q if bool(ok.all()) else torch.linalg.qr(new).Q  # which takes a GPU milliseconds a matrix


# --- the small eigenvalue problem -------------------------------------------------------------------------------------


def ritz_rotation(H: Tensor, way: RitzWay) -> Tensor:
    """P [b, l, l] with orthonormal columns that (nearly) diagonalises H [b, l, l], unordered. H is nearly diagonal."""
    if way == "none":
        return torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    # A broken matrix must not make eigh raise for the whole batch; its caller finds out by other means.
    H = torch.nan_to_num(H, nan=0.0, posinf=1.0, neginf=1.0)
    # In units of the largest entry: huge and tiny weights keep inside the number range.
    scale = H.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(H.dtype).tiny)[..., None, None]
    H = H / scale
    if way == "eigh":
        return torch.linalg.eigh(H).eigenvectors.flip(-1)
    if way == "cpu":
        return _eigh_on_cpu(H)
    if way == "refine":
        return _refined(H, _REFINE_SWEEPS, blocks=False)
    return _refined(H, _HYBRID_SWEEPS, blocks=True)


def _eigh_on_cpu(H: Tensor) -> Tensor:
    on_host = H.cpu()
    with ThreadPool(_CPU_THREADS) as pool:
        vectors = pool.map(lambda h: torch.linalg.eigh(h).eigenvectors.flip(-1), on_host)
    return torch.stack(vectors).to(H.device)


def _refined(H: Tensor, sweeps: int, blocks: bool) -> Tensor:
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    P = identity.expand_as(H)
    for sweep in range(sweeps):
        if blocks:
            for offset in (0, _BLOCK // 2):
                rotation = _block_rotation(H, offset)
                H, P = rotation.mT @ H @ rotation, P @ rotation
        rotation = _pair_rotation(H, identity)
        P = P @ rotation if sweep or blocks else rotation
        if sweep + 1 < sweeps:
            H = rotation.mT @ H @ rotation
    return P


def _pair_rotation(H: Tensor, identity: Tensor) -> Tensor:
    """Orthogonal I + X + ..., X the Jacobi angles of all pairs at once, damped to spectral norm below 1/2. Works on
    twice the angles and halves them where they are added."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    difference = diagonal.unsqueeze(-2) - diagonal.unsqueeze(-1)  # [i, j] = h_j - h_i
    # The angle that zeroes entry (i, j), in (-pi/4, pi/4]: pairs with equal values turn by 45 degrees at most.
    twice = torch.atan2(2 * H, difference.abs()).copysign(difference * H).triu(1)
    twice = twice - twice.mT
    # ||X||_2 <= max row sum; the damping makes crowded clusters turn slowly instead of wildly.
    row_sum = twice.abs().sum(-1).amax(-1)
    return _orthogonalise(torch.addcdiv(identity, twice, row_sum.clamp_min(1)[..., None, None], value=0.5))


def _orthogonalise(Q: Tensor) -> Tensor:
    """Nearest orthogonal matrix by Newton-Schulz; for singular values in [1, 1.12] two steps reach 1e-7."""
    for _ in range(_NEWTON_SCHULZ + 1):
        Q = torch.baddbmm(Q, Q, Q.mT @ Q, beta=1.5, alpha=-0.5)
    return Q


def _block_rotation(H: Tensor, offset: int) -> Tensor:
    """Block-diagonal eigenvectors of the 32 x 32 diagonal blocks of H that start at `offset`."""
    size = H.shape[-1]
    edges = [0, *range(offset or _BLOCK, size, _BLOCK), size]
    rotation = torch.eye(size, dtype=H.dtype, device=H.device).repeat(*H.shape[:-2], 1, 1)
    full = [(a, b) for a, b in pairwise(edges) if b - a == _BLOCK]
    if full:  # all complete blocks of all matrices in one call
        stacked = torch.stack([H[..., a:b, a:b] for a, b in full])
        for (a, b), vectors in zip(full, torch.linalg.eigh(stacked).eigenvectors.flip(-1), strict=True):
            rotation[..., a:b, a:b] = vectors
    for a, b in pairwise(edges):
        if 1 < b - a < _BLOCK:
            rotation[..., a:b, a:b] = torch.linalg.eigh(H[..., a:b, a:b]).eigenvectors.flip(-1)
    return rotation


# --- one warm step ----------------------------------------------------------------------------------------------------


def warm_step(
    W: Tensor, U: Tensor, S: Tensor, V: Tensor, *, way: RitzWay, cut: Tensor | None = None, WV: Tensor | None = None
) -> WarmStep:
    """One subspace iteration with Rayleigh-Ritz from an old basis U [b, m, l], S [b, l], V [b, n, l] of W [b, m, n].

    `cut` [b]: how many columns count in the residual (default all l). Result columns are ordered by singular value and
    keep the sign of the old ones as far as they resemble them. No device wait except for the ways that use eigh. `WV`:
    W V of the old V, where it is known.
    """
    mask = _column_mask(S, cut)
    Y = W @ V if WV is None else WV
    staleness = _relative_residual(Y, U, S, mask)
    Q, ok_left = cholesky_qr2(Y)
    Z = W.mT @ Q
    P = ritz_rotation(Z.mT @ Z, way)
    Z = Z @ P
    values = torch.linalg.vector_norm(Z, dim=-2)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    # gather, not take_along_dim, which looks for negative indices first.
    P, Z = (X.gather(-1, order.unsqueeze(-2).expand_as(X)) for X in (P, Z))
    new_U = Q @ P
    new_V, ok_right = cholesky_qr2(Z, values)
    new_U, new_V = _keep_signs(new_U, new_V, U)
    ok = ok_left & ok_right & (values < math.inf).all(-1)  # a length is not negative, and NaN is less than nothing
    keep = ok[:, None, None]
    new_U, new_V = torch.where(keep, new_U, U), torch.where(keep, new_V, V)
    values = torch.where(ok[:, None], values, S)
    new_WV = W @ new_V
    residual = _relative_residual(new_WV, new_U, values, mask)
    return WarmStep(new_U, values, new_V, residual, staleness, ok, new_WV)


def warm_steps(
    W: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    *,
    way: RitzWay,
    cut: Tensor | None = None,
    tolerance: float = 0.0,
    max_iterations: int = 1,
) -> WarmStep:
    """A warm step; then, for the matrices whose residual is over `tolerance`, filtered ones, at most `max_iterations`
    in all. staleness is the first step's.

    Looking at the residual waits for the device; with max_iterations = 1 nothing waits.
    """
    result = warm_step(W, U, S, V, way=way, cut=cut)
    for _ in range(max_iterations - 1):
        behind = (result.ok & (result.residual > tolerance)).tolist()
        rows = [i for i, is_behind in enumerate(behind) if is_behind]
        if not rows:
            break
        result = _filtered_step(result, rows, W, way, cut)
    return result


def _filtered_step(last: WarmStep, rows: list[int], W: Tensor, way: RitzWay, cut: Tensor | None) -> WarmStep:
    """`last` with one more step of some rows, from right vectors that a polynomial turned to the leading ones."""
    if len(rows) < W.shape[0]:
        W, cut = W[rows], None if cut is None else cut[rows]
    fields = ("U", "S", "V", "residual", "ok", "WV")
    U, S, V, _, _, WV = (getattr(last, field)[rows] for field in fields)
    step = warm_step(W, U, S, chebyshev_filter(W, V, WV, S), way=way, cut=cut)
    keep = step.ok  # otherwise the last step's result stands, and its residual says how good it is
    merged = {"staleness": last.staleness}
    for field in fields[:-2]:
        old, new = getattr(last, field), getattr(step, field)
        merged[field] = old.clone()
        merged[field][rows] = torch.where(keep.view(-1, *[1] * (new.dim() - 1)), new, old[rows])
    merged["ok"], merged["WV"] = last.ok, last.WV.clone()
    merged["WV"][rows] = torch.where(keep[:, None, None], step.WV, WV)
    return WarmStep(**merged)


def chebyshev_filter(W: Tensor, V: Tensor, WV: Tensor, S: Tensor) -> Tensor:
    """T_d(W^T W) V, T_d the Chebyshev polynomial that stays within 1 on [0, s_l^2] and grows fastest beyond: nothing
    made of d products separates the leading directions better (Zhou, Saad, Tiago, Chelikowsky 2006).

    W [b, m, n], V [b, n, l] orthonormal, WV = W V, S [b, l] descending. The degree is the largest for which the top
    direction grows by at most a thousand against the last, beyond which columns become parallel in float32. Waits for
    the device to know it.
    """
    last = S[:, -1:].clamp_min(torch.finfo(S.dtype).tiny)
    top = float((2 * (S[:, :1] / last).square() - 1).nan_to_num(math.inf).amax())
    degree = _largest_degree(top)
    scale = (2 / last.square())[..., None]
    before, now = V, scale * (W.mT @ WV) - V
    for _ in range(degree - 1):
        before, now = now, 2 * (scale * (W.mT @ (W @ now)) - now) - before
    return now


def _largest_degree(top: float) -> int:
    """Largest d <= 8 with T_d(top) <= 1,000; at least 1, which is a plain iteration."""
    if not 1 < top < _GROWTH:
        return 1 if top >= _GROWTH else _MAX_DEGREE
    return max(1, min(_MAX_DEGREE, int(math.acosh(_GROWTH) / math.acosh(top))))


def _column_mask(S: Tensor, cut: Tensor | None) -> Tensor:
    if cut is None:
        return torch.ones_like(S, dtype=torch.bool)
    return torch.arange(S.shape[-1], device=S.device) < cut.unsqueeze(-1)


def _relative_residual(WV: Tensor, U: Tensor, S: Tensor, mask: Tensor) -> Tensor:
    """||W V - U S||_F over the masked columns, relative to ||S||_2 of the same columns; 0 where none."""
    difference = torch.linalg.vector_norm(torch.addcmul(WV, U, S.unsqueeze(-2), value=-1), dim=-2)
    numerator, size = torch.linalg.vector_norm(torch.stack([difference, S]) * mask, dim=-1).unbind()
    return safe_ratio(numerator, size)


def _keep_signs(U: Tensor, V: Tensor, U_old: Tensor) -> tuple[Tensor, Tensor]:
    sign = torch.where((U * U_old).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, V * sign


def staleness_of(W: Tensor, U: Tensor, S: Tensor, V: Tensor, cut: Tensor | None = None) -> Tensor:
    """||W V - U S||_F / ||S||_2 over the first `cut` columns, [b]: 0 when W still has this decomposition.

    Stricter than ||offdiag(V^T W^T W V)||, which neither sees what leaked out of the subspace nor a change of s.
    """
    return _relative_residual(W @ V, U, S, _column_mask(S, cut))


def offdiagonal_share(W: Tensor, V: Tensor) -> Tensor:
    """||offdiag(V^T W^T W V)||_F / ||V^T W^T W V||_F, [b]: how far the old right vectors are from singular."""
    Y = W @ V
    H = Y.mT @ Y
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    off = H - torch.diag_embed(diagonal)
    return safe_ratio(squared_norm(off), squared_norm(H)).sqrt()
