"""The numbers of the two lanes, for a batch of equal shapes at once, without waiting for the device.

Fast lane: where the energy of a gradient or an update sits against a known basis. Slow lane: how a new basis differs
from the last one. Both give one row of numbers a matrix; `fast_values` and `slow_values` turn rows that have
reached the host into named floats, and add what chance predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdtrain.spectral import null
from svdtrain.spectral.metrics import (
    directions_for_energy,
    entropy_rank,
    largest_eigenvalue_bound,
    participation_ratio,
    projection_residual,
    safe_ratio,
    squared_norm,
    stable_rank,
)

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]

FAST_COLUMNS = ("norm", "pp", "left", "right", "erasure", "participation")
SLOW_COLUMNS = (
    "ok", "exact", "skipped", "residual", "staleness", "angle", "sin_squared", "expected", "rho", "gap", "update_ratio",
    "stable_rank", "entropy_rank", "participation_rank", "concentration_90", "intruders", "edge_rank", "threshold_rank",
    "update_share", "update_participation",
)  # fmt: skip
COMPARISONS = (
    "angle", "sin_squared", "expected", "rho", "intruders", "update_ratio", "staleness", "update_share",
    "update_participation",
)  # fmt: skip
_UNMOVED = 1e-6  # relative size of an update
NO_GAP = 1e-3  # relative gap at k under which the largest angle says nothing


# --- fast lane --------------------------------------------------------------------------------------------------------


def fast_statistics(
    X: Tensor, unit: Tensor, total: Tensor, U: Tensor, E: Tensor, V: Tensor, participation: Tensor, *,
    right_side: bool = True,
) -> Tensor:  # fmt: skip
    """Columns FAST_COLUMNS of X [b, m, n] against U [b, m, K] and V [b, n, K] in X's dtype; float32 [b, 6].

    `X, unit, total` as `in_range` gives them, E [b, K] as `erasure_weights`. Columns that are not principal are zero.
    pp, left and right are shares of ||X||_F^2: both sides, left side, right side principal. erasure is
    sum_i s_i u_i^T X v_i / sum_i s_i^2: half the relative first-order change of the principal energy, negative when X
    erases. `participation` [b] is passed through. Without `right_side`, one of the two large products is saved and
    `right` is NaN.
    """
    left = U.mT @ X
    D = left @ V
    parts = torch.stack([_norm(part) for part in (D, left, *((X @ V,) if right_side else ()))])
    size = total.sqrt()
    shares = (parts / size.clamp_min(torch.finfo(size.dtype).tiny)).square().unbind()
    right_share = shares[2] if right_side else torch.full_like(total, math.nan)
    erasure = (E * D.diagonal(dim1=-2, dim2=-1)).sum(-1) * unit
    return torch.stack([size * unit, shares[0], shares[1], right_share, erasure.float(), participation], dim=-1)


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float32)


def erasure_weights(S: Tensor) -> Tensor:
    """s_i / sum_j s_j^2, [b, K]; zeros for S = 0."""
    strongest = S.amax(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    relative = S / strongest  # the square of a tiny value would vanish
    return safe_ratio(relative / strongest, relative.square().sum(-1, keepdim=True).expand_as(relative))


def in_range(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X [b, m, n] in a unit in which its squares stay inside float32, that unit [b], and ||X||_F^2 in it [b].

    A GPU always rescales, in place and by a power of two, for it cannot branch; the CPU looks, and only when it must.
    """
    if not X.is_cuda:
        total = squared_norm(X)
        if all(value == 0 or 1e-15 < value < 1e15 for value in total.tolist()):
            return X, torch.ones_like(total), total
    largest = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1), dtype=torch.float32)
    unit = largest.clamp_min(torch.finfo(torch.float32).tiny).log2().floor().exp2()
    X = X.mul_((1 / unit).to(X.dtype)[:, None, None])
    return X, unit, squared_norm(X)


def participation_of(X: Tensor, total: Tensor) -> Tensor:
    """Participation ratio ||X||_F^4 / ||X X^T||_F^2 of X [b, m, n], float32 [b], in X's own arithmetic; 0 for X = 0.

    X and total = ||X||_F^2 as `in_range` gives them.
    """
    gram = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
    return safe_ratio(total, torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=total.dtype)).square()


_BOTH_SIDES = ("right_share", "mp", "mm", "right_lift", "right_z")
_FAST_NAMES = (
    "finite", "norm", "share", "erasure", "participation", "pp", "pm", "pp_lift", "lift", "z", *_BOTH_SIDES
)  # fmt: skip


def fast_values(table: Numbers, m: Counts, n: Counts, k: Counts, prefix: str = "") -> list[dict[str, float]]:
    """Named floats of each row of FAST_COLUMNS [b, 6]: energy blocks, shares, lifts and z of both sides, and what the
    row holds. m, n, k are [b], `prefix` begins every name.

    The blocks pp, pm, mp, mm sum to 1; m is everything that is not principal (mp, mm and right_* only where the right
    side was computed). `finite` is 0 for a broken input, and nothing else is given then; a zero one has its norm only.
    """
    norm, pp, left, right, erasure, participation = table.T
    with np.errstate(all="ignore"):  # of broken rows, which give nothing
        lift, z = null.share_lift_and_z(left, k, m, participation)
        right_lift, right_z = null.share_lift_and_z(right, k, n, participation)
        columns = [
            np.ones_like(norm), norm, left, erasure, participation, pp, np.maximum(left - pp, 0),
            np.where(k > 0, pp * m * n / np.maximum(k * k, 1), 1.0), lift, z,
            right, np.maximum(right - pp, 0), np.maximum(1 - left - right + pp, 0), right_lift, right_z,
        ]  # fmt: skip
    names = [prefix + name for name in _FAST_NAMES]
    left_only = names[: -len(_BOTH_SIDES)]
    found = []
    for row in np.stack(columns, axis=-1).tolist():
        size, right_share = row[1], row[-len(_BOTH_SIDES)]
        if not math.isfinite(size):
            found.append({names[0]: 0.0})
        elif size == 0:
            found.append(dict(zip(names[:2], row[:2], strict=True)))
        elif math.isfinite(right_share):
            found.append(dict(zip(names, row, strict=True)))
        else:
            found.append(dict(zip(left_only, row[: len(left_only)], strict=True)))
    return found


# --- slow lane --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Basis:
    """A batch of truncated decompositions with the whole spectrum beside it.

    U [b, m, l], S [b, l], V [b, n, l], spectrum [b, g]; beyond l the spectrum is that of the last exact decomposition,
    scaled to the energy that is left.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    spectrum: Tensor


def frobenius_norm(X: Tensor, *, usual: bool) -> Tensor:
    """||X||_F of X [b, m, n], float64 [b], for entries of any size; at once where it is `usual`, its squares being
    known to stay inside the number range."""
    if usual or X.dtype == torch.float64:
        return torch.linalg.vector_norm(X, dim=(-2, -1)).double()
    unit = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1)).clamp_min(torch.finfo(X.dtype).tiny)
    return torch.linalg.vector_norm(X / unit[:, None, None], dim=(-2, -1)).double() * unit.double()


def updated_spectrum(S: Tensor, old_spectrum: Tensor, norm: Tensor) -> Tensor:
    """All g singular values from the l tracked ones S [b, l] and the shape of the old tail, for ||W||_F = norm [b]."""
    tracked = S.shape[-1]
    if tracked == old_spectrum.shape[-1]:
        return S
    strongest = S[:, :1].clamp_min(torch.finfo(S.dtype).tiny)
    tail = old_spectrum[:, tracked:] / strongest
    relative = S / strongest
    left_over = (norm / strongest[:, 0]).square() - relative.double().square().sum(-1)
    factor = safe_ratio(left_over.clamp_min(0), tail.double().square().sum(-1)).sqrt().to(S.dtype)
    tail = torch.minimum(tail * factor.unsqueeze(-1), relative[:, -1:])
    return torch.cat([S, tail * strongest], dim=-1)


def slow_statistics(
    old: Basis, new: Basis, dW: Tensor, norm: Tensor, cut: Tensor, max_cut: int, quality: dict[str, Tensor | float]
) -> Tensor:
    """Columns SLOW_COLUMNS for a batch; [b, 20]. dW [b, m, n] is the update since the old basis, norm [b] = ||W||_F.

    cut [b] is each matrix's k, max_cut a bound the host knows. `quality` gives ok, exact, skipped, residual and
    staleness.
    """
    m, n = dW.shape[-2:]
    width = max(1, max_cut)
    principal = torch.arange(width, device=dW.device) < cut.unsqueeze(-1)
    mask = principal.to(dW.dtype)
    before, after = old.U[..., :width] * mask.unsqueeze(-2), new.U[..., :width] * mask.unsqueeze(-2)
    R = projection_residual(before, after)
    sin_squared = squared_norm(R)
    angle = largest_eigenvalue_bound(R.mT @ R).clamp(0, 1).sqrt().asin()
    update, moved = _in_range_and_size(dW)
    spectrum = new.spectrum.double()  # once, not in each of its metrics
    strongest = spectrum[:, 0].clamp_min(torch.finfo(dW.dtype).tiny)
    # In units of s_1: the square of a tiny update would vanish in float32.
    tau_squared = (moved / strongest).square() / (m * n)
    expected = null.rotation_null(old.spectrum / strongest[:, None].to(dW.dtype), cut, tau_squared, m, max_k=width)
    intruders = (null.intruder_directions(old.U, after, width) & principal).sum(-1)
    edge, threshold = null.signal_rank(spectrum, m, n)
    update_ratio = safe_ratio(moved, norm)
    # A matrix that did not move did not rotate: what is left is the last basis converging.
    rho = torch.where(update_ratio > _UNMOVED, null.rotation_ratio(sin_squared, expected), 1.0)
    update_share, update_participation = _update_evidence(update, after)
    columns = {
        **quality,
        "angle": angle, "sin_squared": sin_squared, "expected": expected,
        "rho": rho, "gap": _gap_at(new.spectrum, cut), "update_ratio": update_ratio,
        "stable_rank": stable_rank(spectrum), "entropy_rank": entropy_rank(spectrum),
        "participation_rank": participation_ratio(spectrum),
        "concentration_90": directions_for_energy(spectrum, 0.9) / spectrum.shape[-1],
        "intruders": intruders, "edge_rank": edge, "threshold_rank": threshold,
        "update_share": update_share, "update_participation": update_participation,
    }  # fmt: skip
    rows = dW.shape[0]
    # new_full, not a tensor made on the host: that one would have to be waited for.
    ordered = (columns[name] for name in SLOW_COLUMNS)
    return _table([c if isinstance(c, Tensor) else dW.new_full((rows,), c) for c in ordered])


def _table(columns: list[Tensor]) -> Tensor:
    """Columns [b] side by side in float32, [b, columns]: one conversion for each type, not for each column."""
    by_type: dict[torch.dtype, list[int]] = {}
    for position, column in enumerate(columns):
        by_type.setdefault(column.dtype, []).append(position)
    parts: dict[int, Tensor] = {}
    for positions in by_type.values():
        stacked = torch.stack([columns[position] for position in positions], dim=-1).float()
        parts |= dict(zip(positions, stacked.split(1, dim=-1), strict=True))
    return torch.cat([parts[position] for position in range(len(columns))], dim=-1)


def _in_range_and_size(dW: Tensor) -> tuple[Tensor, Tensor]:
    """dW [b, m, n] in units of its largest entries, in bfloat16 on a GPU, and ||dW||_F, float64 [b].

    The size is that of the rounded entries: off by 1e-6 of itself, and one pass over all matrices less.
    """
    unit = torch.linalg.vector_norm(dW, math.inf, dim=(-2, -1)).clamp_min(torch.finfo(dW.dtype).tiny)
    X = torch.empty_like(dW, dtype=torch.bfloat16 if dW.is_cuda else dW.dtype)
    torch.div(dW, unit[:, None, None], out=X)  # rounds as it writes: no float32 copy of all matrices in between
    return X, squared_norm(X).double().sqrt() * unit.double()


def _update_evidence(X: Tensor, U_k: Tensor) -> tuple[Tensor, Tensor]:
    """Principal share of an update in range against the new basis, and its participation ratio (tensor cores on a
    GPU)."""
    total = squared_norm(X)
    return safe_ratio(squared_norm(U_k.to(X.dtype).mT @ X), total), participation_of(X, total)


def _gap_at(spectrum: Tensor, cut: Tensor) -> Tensor:
    """(s_k - s_{k+1}) / s_1 with each matrix's own k; 0 for k = 0 or k = g."""
    g = spectrum.shape[-1]
    k = cut.clamp(1, max(g - 1, 1)).unsqueeze(-1)
    above = spectrum.gather(-1, k - 1)
    below = spectrum.gather(-1, k if g > 1 else k - 1)
    gap = safe_ratio((above - below)[:, 0], spectrum[:, 0])
    return torch.where((cut > 0) & (cut < g), gap, 0.0)


def slow_values(table: Numbers, first: list[bool], m: Counts, k: Counts) -> list[dict[str, float]]:
    """Named floats of each row of SLOW_COLUMNS [b, 20], of an m-row matrix with k principal directions (both [b]); only
    `ok` = 0 for a failed one.

    Without an earlier basis (`first`) there is nothing to compare with; where there is no gap at k the largest angle is
    left out and `no_gap` is 1; where nothing moved, the update's evidence is left out.
    """
    share, participation = (table[:, SLOW_COLUMNS.index(f"update_{name}")] for name in ("share", "participation"))
    with np.errstate(all="ignore"):  # of failed rows, which give nothing
        evidence = null.share_lift_and_z(share, k, m, participation)
    lifts, zs = (column.tolist() for column in evidence)
    found = []
    for row, is_first, lift, z in zip(table.tolist(), first, lifts, zs, strict=True):
        values: dict[str, float] = dict(zip(SLOW_COLUMNS, row, strict=True))
        if not values["ok"]:
            found.append({"ok": 0.0})
            continue
        if is_first:
            values = {key: value for key, value in values.items() if key not in COMPARISONS}
        elif values["update_ratio"] > 0 and values["update_participation"] > 0:
            values["update_lift"], values["update_z"] = lift, z
        else:
            del values["update_share"], values["update_participation"]
        values["no_gap"] = float(values["gap"] < NO_GAP)
        if values["no_gap"]:
            values.pop("angle", None)
        found.append(values)
    return found
