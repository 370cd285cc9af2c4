"""The slow lane's work on a snapshot: warm iterations, exact decompositions, and what changed since the last time.

`run_job` may run in another thread; it touches nothing but its job.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdtrain.spectral.decompose import Decomposition, DecompositionFailed, decompose_many
from svdtrain.spectral.lanes import SLOW_COLUMNS, Basis, frobenius_norm, slow_statistics, updated_spectrum
from svdtrain.spectral.subspace import RitzWay, columns_beside, staleness_of, warm_steps

log = logging.getLogger(__name__)

_REFINE_REACHES = 192  # columns up to which products alone leave an off-diagonal of 2e-6; at 288 it is 1e-3


@dataclass(frozen=True, eq=False)
class Part:
    """Matrices of one bucket: weights and references [b, m, n], old bases, k of each as far as those reach, and which
    are to be exact."""

    names: list[str]
    W: Tensor
    reference: Tensor
    old: Basis
    cut: Tensor
    max_cut: int
    exact: list[bool]
    first: list[bool]
    filled: list[int]
    """Columns of each old basis that are there; zeros follow."""
    wanted: list[int]
    """k that the new basis is for."""
    usual: bool
    """Whether squares of all weights stay inside the number range, as those of trained ones do."""


@dataclass(frozen=True, eq=False)
class Job:
    """One analysis of some matrices at one step."""

    step: int
    parts: list[Part]
    ritz: RitzWay | Literal["auto"]
    skip_tolerance: float
    residual_tolerance: float
    max_iterations: int


@dataclass(frozen=True, eq=False)
class RowResult:
    """New basis of one matrix (no batch dimension), its spectrum on the host, the weight it belongs to, and its row of
    SLOW_COLUMNS."""

    basis: Basis
    host_spectrum: Tensor
    weight: Tensor
    table: list[float]
    exact: bool
    ok: bool
    skipped: bool
    first: bool


@torch.no_grad()
def run_job(job: Job) -> dict[str, RowResult]:
    """Analyse every part."""
    results: dict[str, RowResult] = {}
    for part in job.parts:
        try:
            for rows, skipped in _split(part, job.skip_tolerance):
                if rows:
                    results.update(_analyse(part, rows, skipped, job))
        except RuntimeError as error:  # out of memory, or a library that gave up: training must go on
            log.warning("the analysis of %s failed, the old bases are kept: %s", part.names, error)
            results.update({name: _failed(part, i) for i, name in enumerate(part.names)})
    return results


def _failed(part: Part, i: int) -> RowResult:
    old = Basis(part.old.U[i], part.old.S[i], part.old.V[i], part.old.spectrum[i])
    table = [0.0] * len(SLOW_COLUMNS)
    return RowResult(
        old, torch.zeros(0, device="cpu"), part.W[i], table, exact=False, ok=False, skipped=False, first=part.first[i]
    )


def _split(part: Part, skip_tolerance: float) -> list[tuple[list[int], bool]]:
    """Rows to analyse and rows to skip (basis still good, not asked to be exact)."""
    everything = list(range(len(part.names)))
    if skip_tolerance <= 0:
        return [(everything, False)]
    stale = staleness_of(part.W.to(part.old.S.dtype), part.old.U, part.old.S, part.old.V, part.cut).tolist()
    whole = [filled == part.old.S.shape[-1] for filled in part.filled]
    skip = [i for i in everything if whole[i] and not part.exact[i] and stale[i] < skip_tolerance]
    return [([i for i in everything if i not in skip], False), (skip, True)]


def _analyse(part: Part, rows: list[int], skipped: bool, job: Job) -> dict[str, RowResult]:
    old = _pick(part.old, rows)
    dtype = _work_dtype(part.old.S)
    W = _take(part.W, rows).to(dtype)
    norm = frobenius_norm(W, usual=part.usual)
    work = Basis(*(t.to(dtype) for t in (old.U, old.S, old.V, old.spectrum)))
    new, residual, staleness, ok = (
        _keep(W, work, _take(part.cut, rows)) if skipped else _iterate(part, rows, W, norm, work, job)
    )
    exact = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    if not skipped:
        new, exact, ok, residual = _exact_rows(part, rows, new, ok, residual)
    dW = W - _take(part.reference, rows).to(dtype)
    quality = {
        "ok": ok.float(), "exact": _flags(exact, W.device), "skipped": float(skipped),
        "residual": residual, "staleness": staleness,
    }  # fmt: skip
    table = slow_statistics(work, new, dW, norm, _take(part.cut, rows), part.max_cut, quality).tolist()
    stored = [t.to(old.S.dtype) for t in (new.U, new.S, new.V, new.spectrum)]
    on_host = stored[-1].float().cpu()
    bases = [Basis(*row) for row in zip(*(t.unbind() for t in stored), strict=True)]  # one call, not one a matrix
    return {
        part.names[i]: RowResult(
            basis=basis, host_spectrum=spectrum.clone(), weight=W_i, table=numbers, exact=is_exact,
            ok=numbers[0] > 0, skipped=skipped, first=part.first[i],
        )
        for i, basis, spectrum, W_i, numbers, is_exact in zip(
            rows, bases, on_host.unbind(), _take(part.W, rows).unbind(), table, exact.tolist(), strict=True
        )
    }  # fmt: skip


def _flags(values: Tensor, device: torch.device) -> Tensor | float:
    """Flags that are on the host, for the device's table; one number where they agree, which needs no copy."""
    if values.all() or not values.any():
        return float(values[0])
    return values.to(device).float()


def _work_dtype(S: Tensor) -> torch.dtype:
    """float64 where float32 products are allowed to be TF32: three digits are not enough for a basis, and flipping
    the global switch from a thread would change the model's own products (and make compiled graphs recompile)."""
    if S.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return torch.float64
    return S.dtype


def _take(X: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a stack; the stack itself when they are all of it, which saves a copy."""
    return X if rows == list(range(X.shape[0])) else X[rows]


def _pick(basis: Basis, rows: list[int]) -> Basis:
    return Basis(*(_take(t, rows) for t in (basis.U, basis.S, basis.V, basis.spectrum)))


def _keep(W: Tensor, old: Basis, cut: Tensor) -> tuple[Basis, Tensor, Tensor, Tensor]:
    stale = staleness_of(W, old.U, old.S, old.V, cut)
    return old, stale, stale, torch.ones_like(stale, dtype=torch.bool)


def _iterate(
    part: Part, rows: list[int], W: Tensor, norm: Tensor, old: Basis, job: Job
) -> tuple[Basis, Tensor, Tensor, Tensor]:
    """Warm step of the rows that are not exact; the others pass through with ok = False."""
    warm = [j for j, i in enumerate(rows) if not part.exact[i]]
    if not warm:
        return old, *_nothing_known(W)
    base = _filled(_pick(old, warm), [part.filled[rows[j]] for j in warm])
    cut = _take(part.cut, [rows[j] for j in warm])
    wanted, known = ([values[rows[j]] for j in warm] for values in (part.wanted, part.filled))
    if any(k > columns for k, columns in zip(wanted, known, strict=True)):
        cut = torch.tensor(wanted, device=W.device)
    result = warm_steps(
        _take(W, warm), base.U, base.S, base.V, way=_ritz_way(job.ritz, base.S), cut=cut,
        tolerance=job.residual_tolerance, max_iterations=job.max_iterations,
    )  # fmt: skip
    spectrum = updated_spectrum(result.S, base.spectrum, _take(norm, warm))
    if len(warm) == len(rows):
        return Basis(result.U, result.S, result.V, spectrum), result.residual, result.staleness, result.ok
    residual, staleness, ok = _nothing_known(W)
    residual[warm], staleness[warm], ok[warm] = result.residual, result.staleness, result.ok
    merged = [t.clone() for t in (old.U, old.S, old.V, old.spectrum)]
    for target, source in zip(merged, (result.U, result.S, result.V, spectrum), strict=True):
        target[warm] = source
    return Basis(*merged), residual, staleness, ok


def _filled(basis: Basis, filled: list[int]) -> Basis:
    """With columns to start from where there are none yet; what a basis grows by is found by iterating, too."""
    width = basis.S.shape[-1]
    U, S, V = basis.U, basis.S, basis.V
    for start in sorted(set(filled) - {width}):
        rows = [j for j, count in enumerate(filled) if count == start]
        U, S, V = (t.clone() for t in (U, S, V))
        for X in (U, V):
            X[rows, :, start:] = columns_beside(X[rows, :, :start], width - start)
        S[rows, start:] = basis.spectrum[rows, start:width]
    return Basis(U, S, V, basis.spectrum)


def _nothing_known(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """residual, staleness and ok of matrices that took no warm step."""
    zero = W.new_zeros(W.shape[0])
    return zero, zero.clone(), zero.bool()


def _ritz_way(way: RitzWay | Literal["auto"], S: Tensor) -> RitzWay:
    if way != "auto":
        return way
    if not S.is_cuda:
        return "eigh"
    return "refine" if S.shape[-1] <= _REFINE_REACHES else "hybrid"


def _exact_rows(
    part: Part, rows: list[int], new: Basis, ok: Tensor, residual: Tensor
) -> tuple[Basis, Tensor, Tensor, Tensor]:
    """Replace the rows asked to be exact; a failed one keeps its old basis and is reported."""
    wanted = [j for j, i in enumerate(rows) if part.exact[i]]
    exact = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    if not wanted:
        return new, exact, ok, residual
    ok, width = ok.clone(), new.S.shape[-1]
    merged = [t.clone() for t in (new.U, new.S, new.V, new.spectrum)]
    for j, result in zip(wanted, _decompose([part.W[rows[j]] for j in wanted]), strict=True):
        if result is None:
            log.warning("%s: no decomposition; its old basis is kept and training goes on", part.names[rows[j]])
            continue
        parts = (result.U[:, :width], result.S[:width], result.V[:, :width], result.S)
        for target, source in zip(merged, parts, strict=True):
            target[j] = source
        exact[j], ok[j] = True, True
    return Basis(*merged), exact, ok, residual


def _decompose(matrices: list[Tensor]) -> list[Decomposition | None]:
    try:
        return list(decompose_many(matrices))
    except DecompositionFailed as failure:
        log.warning("exact decomposition failed: %s", failure)
        return failure.results
