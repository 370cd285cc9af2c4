"""How many directions stay trainable. r counts the minor directions, k = g - r are protected; r only goes down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdtrain.spectral.metrics import directions_for_energy

_START_BELOW_RANK = 10
_ENERGY = 0.999  # protecting more than this share of the energy protects noise
_GAP_RATIO = 1.2  # s_k / s_{k+1} from which the spectrum counts as having a gap there
_CALM = 0.02  # relative change of the bottom values between two analyses below which they count as settled
_SHRINK = 0.95  # r shrinks by this factor when the bottom values have settled and there is no gap
_LARGEST_DROP = 0.75  # nothing takes more than a quarter of r at one analysis


@dataclass(frozen=True, kw_only=True)
class RankChoice:
    """The next r and the numbers that led to it.

    reason: at_minimum, energy_floor, spectral_gap, bottom_still_moving, no_history or bottom_settled.
    """

    r: int
    reason: str
    r_gap: int | None
    gap_ratio: float
    r_energy: int
    bottom_change: float | None


def numerical_rank(S: Tensor, *, dtype: torch.dtype = torch.float32) -> int:
    """Number of singular values above g * eps(dtype) * s_1."""
    values = S.detach().double()
    return int((values > values.shape[-1] * torch.finfo(dtype).eps * values[0]).sum())


def initial_rank(S: Tensor) -> int:
    """rank(W) - 10, at least 1: where r starts."""
    return max(1, numerical_rank(S) - _START_BELOW_RANK)


def determine_next_r(S: Tensor, S_prev: Tensor | None, r_current: int, r_min: int) -> int:
    """The next number of trainable directions, between r_min and r_current. See `choose_rank` for the reasons."""
    return choose_rank(S, S_prev, r_current, r_min).r


def choose_rank(S: Tensor, S_prev: Tensor | None, r_current: int, r_min: int) -> RankChoice:
    """Next r from the spectral gap, 99.9 % of the energy and the rate of change of the bottom values.

    S, S_prev: [g] descending, of this and the last analysis (None: there was none).
    * Energy: k never grows past the directions that hold 99.9 % of the energy, so r never falls below r_energy.
    * Gap: the largest ratio s_k / s_{k+1} >= 1.2 among the cuts still allowed is taken at once.
    * Rate: without a gap, r shrinks by 5 % once its own values changed by less than 2 % since the last analysis.
    At most a quarter of r goes at one analysis. Raises ValueError for an r outside [0, g] or a non-finite S.
    """
    spectrum = spectrum_on_host(S)
    _check(spectrum, r_current, r_min)
    g = spectrum.shape[0]
    relative = spectrum / max(
        float(spectrum[0]), float(np.finfo(np.float64).tiny)
    )  # the square of a large one overflows
    r_energy = g - int(directions_for_energy(torch.from_numpy(relative), _ENERGY))
    floor = max(r_min, r_energy)
    lowest = max(floor, math.ceil(r_current * _LARGEST_DROP))
    r_gap, gap_ratio = _gap(spectrum, r_current, lowest)
    change = _bottom_change(spectrum, S_prev, r_current)
    numbers = {"r_gap": r_gap, "gap_ratio": gap_ratio, "r_energy": r_energy, "bottom_change": change}
    if r_current <= r_min:
        return RankChoice(r=r_current, reason="at_minimum", **numbers)
    if r_current <= floor:
        return RankChoice(r=r_current, reason="energy_floor", **numbers)
    if r_gap is not None:
        return RankChoice(r=r_gap, reason="spectral_gap", **numbers)
    if change is None:
        return RankChoice(r=r_current, reason="no_history", **numbers)
    if change > _CALM:
        return RankChoice(r=r_current, reason="bottom_still_moving", **numbers)
    shrunk = min(r_current - 1, int(r_current * _SHRINK))
    return RankChoice(r=max(lowest, shrunk), reason="bottom_settled", **numbers)


def spectrum_on_host(S: Tensor) -> NDArray[np.float64]:
    """Singular values [g] in numpy: a decision asks a dozen questions of each of a hundred short vectors, and a call of
    torch takes several times as long as one of numpy."""
    return S.detach().cpu().double().numpy()


def _check(S: NDArray[np.float64], r_current: int, r_min: int) -> None:
    if S.ndim != 1 or not np.isfinite(S).all():
        raise ValueError("S must be one finite vector of singular values")
    if not 0 <= r_current <= S.shape[0]:
        raise ValueError(f"r_current must lie in [0, {S.shape[0]}], got {r_current}")
    if r_min < 0:
        raise ValueError(f"r_min must not be negative, got {r_min}")


def _gap(S: NDArray[np.float64], r_current: int, r_lowest: int) -> tuple[int | None, float]:
    """The r in [r_lowest, r_current - 1] with the largest s_k / s_{k+1}, if that is a gap; and the ratio."""
    g = S.shape[0]
    first_k, last_k = max(1, g - r_current + 1), min(g - 1, g - r_lowest)
    if last_k < first_k:
        return None, 1.0
    above, below = S[first_k - 1 : last_k], S[first_k : last_k + 1]
    limits = np.finfo(np.float64)
    ratios = above / np.maximum(below, limits.eps * max(float(S[0]), float(limits.tiny)))
    best = int(ratios.argmax())
    ratio = float(ratios[best])
    return (g - (first_k + best) if ratio >= _GAP_RATIO else None), ratio


def _bottom_change(S: NDArray[np.float64], S_prev: Tensor | None, r: int) -> float | None:
    """Relative change of the r smallest values since the last analysis."""
    if S_prev is None or r == 0:
        return None
    before = spectrum_on_host(S_prev)
    if before.shape != S.shape:
        raise ValueError(f"S_prev has shape {before.shape}, S has {S.shape}")
    scale = float(np.linalg.norm(before[-r:]))
    change = float(np.linalg.norm(S[-r:] - before[-r:]))
    return change / scale if scale > 0 else (0.0 if change == 0 else math.inf)
