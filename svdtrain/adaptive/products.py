"""The products of low-rank mode for many matrices at once: gradients, merge, matched updates.

Equal ones are stacked, so that a step takes few launches. Which are stacked together follows from their order and
shapes alone; callers keep the order of the targets, the same on every rank and after a resume.
"""

# pyright: reportPrivateImportUsage=false
# (the torch._foreach functions are private by name only: torch's own optimizers are built on them)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.stacks import runs_of_equals

_NEWTON_STEPS = 4
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORTH_STACKING = 4  # so many equal matrices; stacking itself takes as many launches as three by themselves


@dataclass(frozen=True, kw_only=True, eq=False)
class Before:
    """N equal matrices as they are before a step: B [N, m, r], A [N, r, n], W [N, m, n]."""

    lowrank: list[FactoredWeight]
    B: Tensor
    A: Tensor
    W: Tensor


def project_gradients(lowrank: Sequence[FactoredWeight]) -> None:
    """B.grad = G A^T and A.grad = B^T G of each; None where W has no gradient."""
    for factors in lowrank:
        factors.clear_gradients()
    for alike in _alike([factors for factors in lowrank if factors.W.grad is not None]):
        if len(alike) < _WORTH_STACKING:
            for factors in alike:
                factors.project_gradient()
            continue
        with full_precision(alike[0].W.device):
            G = torch.stack([factors.W.grad for factors in alike if factors.W.grad is not None])
            B, A = _factor_stacks(alike)
            grads = zip((G @ A.mT).unbind(), (B.mT @ G).unbind(), strict=True)
        for factors, (grad_B, grad_A) in zip(alike, grads, strict=True):
            factors.B.grad, factors.A.grad = grad_B, grad_A


def merge(lowrank: Sequence[FactoredWeight]) -> None:
    """W <- W_p + B A of each, in place."""
    for alike in _alike(lowrank):
        if len(alike) < _WORTH_STACKING:
            for factors in alike:
                factors.merge()
            continue
        with full_precision(alike[0].W.device):
            dense = torch.stack([factors.W_p for factors in alike])
            B, A = (t.to(dense.dtype) for t in _factor_stacks(alike))
            torch._foreach_copy_([factors.W for factors in alike], list(dense.baddbmm_(B, A).unbind()))
        for factors in alike:
            factors.mark_merged()


def note_checksums(lowrank: Sequence[FactoredWeight]) -> None:
    """That of each W that has been merged since the last call, for `rewritten`."""
    merged = [factors for factors in lowrank if factors.checksum is None]
    for factors, checksum in zip(merged, _checksums(merged), strict=True):
        factors.checksum = checksum


def rewritten(lowrank: Sequence[FactoredWeight], *, wait: bool) -> list[FactoredWeight]:
    """Those that somebody has written since they were merged: by PyTorch's count of writes, and by the checksum where
    the count does not tell (`p.data.clamp_()`). Checksums on a GPU are looked at only with `wait`."""
    found = {id(factors) for factors in lowrank if factors.counted_a_write}
    looked_at = [f for f in lowrank if f.checksum is not None and (wait or f.W.device.type == "cpu")]
    for device in {f.W.device for f in looked_at}:
        there = [f for f in looked_at if f.W.device == device]
        before = torch.stack([f.checksum for f in there if f.checksum is not None])
        differs = (torch.stack(_checksums(there)) != before).tolist()
        found |= {id(f) for f, written in zip(there, differs, strict=True) if written}
    return [factors for factors in lowrank if id(factors) in found]


def _checksums(lowrank: Sequence[FactoredWeight]) -> list[Tensor]:
    """The bits of each W as integers, summed: exact, so whoever adds them up in whatever order finds the same."""
    sums: dict[int, Tensor] = {}
    keys = [(f.W.shape, f.W.dtype, f.W.device) for f in lowrank]
    for run in runs_of_equals(keys, [f.W.numel() for f in lowrank]):
        bits = torch.stack([lowrank[i].W.detach() for i in run]).flatten(1)
        whole_words = bits.shape[1] * bits.element_size() % 8 == 0
        words = bits.view(torch.int64 if whole_words else _INTEGERS[bits.element_size()])
        sums |= zip(run, words.sum(1).unbind(), strict=True)
    return [sums[i] for i in range(len(lowrank))]


def remember(lowrank: Sequence[FactoredWeight]) -> list[Before]:
    """These as they are now, for `match_updates`."""
    kept = []
    for alike in _alike(lowrank):
        B, A = _factor_stacks(alike)
        kept.append(Before(lowrank=alike, B=B, A=A, W=torch.stack([factors.W.detach() for factors in alike])))
    return kept


def match_updates(kept: Sequence[Before], full_norms: Callable[[Sequence[FactoredWeight], Tensor], Tensor]) -> None:
    """Scale each step just taken by B and A so that ||dW||_F is what `full_norms(matrices, W before)` [N] gives."""
    for before in kept:
        B, A = before.B, before.A
        with full_precision(B.device):
            B_now, A_now = _factor_stacks(before.lowrank)
            dB, dA = B_now - B, A_now - A
            wanted = full_norms(before.lowrank, before.W)
            x = _step_length(torch.baddbmm(dB @ A, B, dA), dB @ dA, wanted)[:, None, None]
            torch._foreach_copy_([factors.B for factors in before.lowrank], list((B + x * dB).unbind()))
            torch._foreach_copy_([factors.A for factors in before.lowrank], list((A + x * dA).unbind()))


def _step_length(linear: Tensor, square: Tensor, wanted: Tensor) -> Tensor:
    """x [N] with ||x linear + x^2 square||_F = wanted [N], for stacks [N, m, n]; 1 where there was no step.

    dW(x) = x (dB A + B dA) + x^2 dB dA: its squared norm is a polynomial of three inner products; solved for x by
    Newton's method on the device, without waiting for it.
    """
    ll, lq, qq = (torch.linalg.vecdot(s.flatten(1), t.flatten(1)) for s, t in _pairs(linear, square))
    tiny = torch.finfo(ll.dtype).tiny
    wanted = wanted.to(ll.dtype)
    x = wanted / ll.sqrt().clamp_min(tiny)
    for _ in range(_NEWTON_STEPS):
        excess = x * x * (ll + 2 * x * lq + x * x * qq) - wanted * wanted
        slope = 2 * x * (ll + 3 * x * lq + 2 * x * x * qq).clamp_min(0.1 * ll)
        x = x - excess / slope.clamp_min(tiny)
    return torch.where(ll > 0, x, torch.ones_like(x))


def _pairs(linear: Tensor, square: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (linear, linear), (linear, square), (square, square)


def _alike(lowrank: Sequence[FactoredWeight]) -> list[list[FactoredWeight]]:
    """Those of one shape, rank, type and device together, cut so that a working copy fits in memory."""
    keys = [(f.W.shape, f.r, f.W.dtype, f.W_p.dtype, f.W.device) for f in lowrank]
    runs = runs_of_equals(keys, [factors.W.numel() for factors in lowrank])
    return [[lowrank[index] for index in run] for run in runs]


def _factor_stacks(alike: Sequence[FactoredWeight]) -> tuple[Tensor, Tensor]:
    """Copies of B [N, m, r] and A [N, r, n]."""
    return torch.stack([f.B.detach() for f in alike]), torch.stack([f.A.detach() for f in alike])
