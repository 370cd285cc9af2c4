"""How an optimizer's per-parameter state moves between W and its factors B and A.

First moments follow the gradient's own chain rule, M_B = M_W A^T and M_A = B^T M_W; the way back is the least-squares
inverse of that map. Second moments use the squared factors of the same maps. State is recognised by its keys, so this
serves torch's AdamW, Adam, SGD and Muon and any optimizer that uses their names.

Every function takes one matrix or a stack of them, [..., m, n]; `stacks` puts many matrices through in few launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]

FIRST_MOMENTS = {"momentum_buffer": None, "exp_avg": None}
"""Linear in the gradient, shaped like the parameter."""
SECOND_MOMENTS = {"exp_avg_sq": "exp_avg", "max_exp_avg_sq": "exp_avg"}
"""Quadratic in the gradient, and the first moment each divides."""
REDUCED_SECOND_MOMENT = "second_momentum_buffer"
"""NorMuon's per-row [m, 1] (m >= n) or per-column [1, n] mean square of the orthogonalised update."""


_BLOCK = 192  # rows of a Cholesky factorisation left to the library


class PerMatrix(tuple):
    """In a stacked state: what an optimizer keeps for each matrix that is no matrix itself (a step count), in order."""


class UnknownState(ValueError):
    """The optimizer keeps something for this parameter that has no known map to B and A."""


def first_to_factors(M: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """M_B [..., m, r] = M A^T and M_A [..., r, n] = B^T M for M [..., m, n]."""
    return M @ A.mT, B.mT @ M


def first_from_factors(M_B: Tensor, M_A: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """The M [..., m, n] of least norm with M A^T = M_B and B^T M = M_A; float64.

    In orthonormal bases Q_B of B's columns and Q_A of A's rows: M Q_A^T follows from M_B alone, Q_B^T M from M_A alone,
    and Q_B^T M Q_A^T from both, whose mean is taken (they differ once the factors have moved under their own averages).
    """
    B, A, M_B, M_A = (t.double() for t in (B, A, M_B, M_A))
    L_B, L_A = inverse_cholesky(_with_ridge(torch.stack([B.mT @ B, A @ A.mT]))).unbind()
    Q_B, Q_A = B @ L_B.mT, L_A @ A
    left, right = M_B @ L_A.mT, L_B @ M_A  # M Q_A^T and Q_B^T M
    both = (Q_B.mT @ left + right @ Q_A.mT) / 2
    return (left - Q_B @ both) @ Q_A + Q_B @ right


def _with_ridge(gram: Tensor) -> Tensor:
    """Gram matrices [..., r, r] with a ridge that float32 factors cannot feel. A direction in which the factor
    vanishes carries no moment, and the ridge maps its zero to zero."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = (1e-12 * diagonal.amax(-1, keepdim=True)).clamp_min(torch.finfo(gram.dtype).tiny)
    diagonal.add_(ridge)
    return gram


def inverse_cholesky(H: Tensor, block: int = _BLOCK) -> Tensor:
    """L^-1 [..., r, r] for positive definite H = L L^T, by halves: all but the blocks on the diagonal is products.

    Factorisations and triangular solves of a stack run far below a GPU's speed from a few hundred rows on, or one
    matrix after the other. Raises torch.linalg.LinAlgError where H is not positive definite.
    """
    r = H.shape[-1]
    if r <= block:
        identity = torch.eye(r, dtype=H.dtype, device=H.device)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(H), identity, upper=False)
    h = r // 2
    top = inverse_cholesky(H[..., :h, :h], block)
    below = H[..., h:, :h] @ top.mT
    bottom = inverse_cholesky(H[..., h:, h:] - below @ below.mT, block)
    inverse = torch.zeros_like(H)
    inverse[..., :h, :h], inverse[..., h:, h:] = top, bottom
    inverse[..., h:, :h] = -(bottom @ below) @ top
    return inverse


def second_to_factors(v: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """v_B = v (A*A)^T and v_A = (B*B)^T v: what the squares of the chain rule average to when the entries of G are
    uncorrelated."""
    return v @ A.square().mT, B.square().mT @ v


def second_from_factors(v_B: Tensor, v_A: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """A non-negative v [..., m, n] whose weighted row and column means are those that v_B and v_A imply: the rank-one
    estimate of Adafactor (arXiv:1804.04235, section 3)."""
    tiny = torch.finfo(v_B.dtype).tiny
    rows = v_B.sum(dim=-1, keepdim=True) / A.square().sum(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    columns = v_A.sum(dim=-2, keepdim=True) / B.square().sum(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    mean = (rows.mean(dim=-2, keepdim=True) + columns.mean(dim=-1, keepdim=True)) / 2
    # Zero where there is nothing, without looking at it on the host.
    return torch.where(mean > tiny, rows * (columns / mean.clamp_min(tiny)), 0.0)


def state_to_factors(state: Mapping[str, Any], B: Tensor, A: Tensor) -> tuple[State, State]:
    """The optimizer state of W, carried to B and A. Raises UnknownState for a key without a known map.

    Stacked: tensors have B's leading dimensions, and a `PerMatrix` holds what is not stacked."""
    shape = (*B.shape[:-1], A.shape[-1])
    B_wide, A_wide = _wide(B), _wide(A)
    state_B, state_A = {}, {}
    for key in sorted(state, key=lambda name: name in SECOND_MOMENTS):  # first moments before those that divide them
        value = state[key]
        if not isinstance(value, Tensor) or value.ndim == 0:
            pair = _copy(value), _copy(value)
        elif key in FIRST_MOMENTS and value.shape == shape:
            pair = first_to_factors(value.to(B_wide.dtype), B_wide, A_wide)
        elif key in SECOND_MOMENTS and value.shape == shape:
            pair = second_to_factors(value.to(B_wide.dtype), B_wide, A_wide)
            moment = SECOND_MOMENTS[key]
            # Entries of G are correlated in fact, so v may come out too small; v >= m^2 bounds the first update by lr.
            pair = _floor(pair[0], state_B.get(moment)), _floor(pair[1], state_A.get(moment))
        elif key == REDUCED_SECOND_MOMENT and value.shape in ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1])):
            pair = _reduced_to_factors(value, B, A)
        else:
            own_shape = tuple(value.shape[B.ndim - 2 :])
            raise UnknownState(f"no map from W to B and A for optimizer state {key!r} of shape {own_shape}")
        state_B[key], state_A[key] = (_like(part, value) for part in pair)
    return state_B, state_A


def state_from_factors(state_B: Mapping[str, Any], state_A: Mapping[str, Any], B: Tensor, A: Tensor) -> State:
    """The optimizer state of W from those of B and A: the inverse of `state_to_factors`."""
    B_wide, A_wide = _wide(B), _wide(A)
    state = {}
    for key in state_B:
        value, other = state_B[key], state_A[key]
        if not isinstance(value, Tensor) or value.ndim == 0:
            state[key] = _copy(value)
        elif key in FIRST_MOMENTS:
            state[key] = _like(first_from_factors(value, other, B_wide, A_wide), value)
        elif key in SECOND_MOMENTS:
            state[key] = _like(second_from_factors(_wide(value), _wide(other), B_wide, A_wide), value)
        elif key == REDUCED_SECOND_MOMENT:
            state[key] = value.clone() if B.shape[-2] >= A.shape[-1] else other.clone()
        else:
            raise UnknownState(f"no map from B and A to W for optimizer state {key!r}")
    return state


def _reduced_to_factors(value: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The side that W's buffer describes (rows: B, columns: A) inherits it; the other starts from zero, which for
    this buffer is neutral because the update is renormalised by its own overall scale."""
    lead = B.shape[:-2]
    if value.shape == (*B.shape[:-1], 1):
        return value.clone(), value.new_zeros(*lead, 1, A.shape[-1])
    return value.new_zeros(*lead, B.shape[-2], 1), value.clone()


def _floor(v: Tensor, moment: Tensor | None) -> Tensor:
    return v if moment is None else torch.maximum(v, moment.to(v.dtype).square())


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def _copy(value: Any) -> Any:
    if isinstance(value, PerMatrix):
        return PerMatrix(_copy(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def _like(part: Any, value: Any) -> Any:
    return part.to(value.dtype) if isinstance(value, Tensor) else part
