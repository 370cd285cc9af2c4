"""Moving matrices between full and low-rank mode, with their optimizer state."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdtrain.adaptive.factors import FactoredWeight, ParameterCounts
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.products import rewritten
from svdtrain.adaptive.registration import Adapter, Refactored
from svdtrain.adaptive.target import Target
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition
from svdtrain.spectral.null import factor_drift

logger = logging.getLogger(__name__)
GUARDED = frozenset({"core", "activation"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """Where one matrix goes: to full mode (r None), or into low-rank mode at rank r, or to a new rank there."""

    target: Target
    r: int | None
    decomposition: Decomposition | None = None
    """Of the current W; wanted for an r wherever `Transitions.needs_decomposition`."""


class Transitions:
    """Carries out what was decided. W is never written here."""

    def __init__(self, config: SVDConfig, adapter: Adapter) -> None:
        """`references` holds E[x x^T] by matrix name, for protect=activation. Raises ValueError where updates are to be
        matched in size and nothing says what the full one would be."""
        if config.svd_match_rms and config.svd_protect not in GUARDED:
            adapter.check_full_update_norms()
        self._config = config
        self._adapter = adapter
        self.references: dict[str, Tensor] = {}

    def set_references(self, covariances: dict[str, Tensor], targets: dict[str, Target]) -> None:
        """New covariances; matrices that are guarded by activation now get their new guard at once. Raises ValueError
        for one that does not fit its matrix or is not finite."""
        for name, C in covariances.items():
            n = targets[name].W.shape[1]
            if C.shape != (n, n) or not bool(torch.isfinite(C).all()):
                raise ValueError(
                    f"{name}: the covariance of its inputs must be {n} x {n} and finite, got {tuple(C.shape)}"
                )
        self.references.update(covariances)
        for name in covariances:
            if targets[name].guard is not None and self._config.svd_protect == "activation":
                targets[name].guard = self._activation_guard(targets[name])

    def possible(self, target: Target) -> bool:
        """False: protect=activation and nothing is known of this matrix' inputs."""
        return self._config.svd_protect != "activation" or target.name in self.references

    @property
    def needs_decomposition(self) -> bool:
        """False: protect=activation, which looks at the inputs and not at W."""
        return self._config.svd_protect != "activation"

    def carry_out(self, moves: Sequence[Move]) -> None:
        """All moves of one decision; matrices that go the same way go together. Full to full is no move."""
        if not moves:
            return
        with full_precision(moves[0].target.W.device):
            self._to_full([move.target for move in moves if move.r is None and move.target.lowrank])
            lowrank = [move for move in moves if move.r is not None]
            staying = [move for move in lowrank if move.target.lowrank]
            self._to_lowrank([move for move in lowrank if not move.target.lowrank])
            self._refactor(staying)

    def keep_foreign_writes(self, targets: Iterable[Target], *, wait: bool) -> None:
        """Low-rank matrices that somebody else has written since the last step keep that, and it is said. `wait`: the
        device may be waited for. Raises ValueError where W is of another type or elsewhere than B and A."""
        by_factors = {target.factors: target for target in targets if target.factors is not None}
        for factors, target in by_factors.items():
            if (factors.B.dtype, factors.B.device) != (target.W.dtype, target.W.device):
                raise ValueError(
                    f"{target.name} has become {target.W.dtype} on {target.W.device} while it is low-rank; convert or "
                    "move the model before svdtrain.attach"
                )
        for factors in rewritten(list(by_factors), wait=wait):
            target, change = by_factors[factors], factors.take_up_foreign_write()
            if change > 0:
                logger.warning(
                    "%s was written between two steps while it is low-rank (%.3g of its size): what was written stays, "
                    "and B and A train on beside it; with a checkpoint, load the state of the method, too",
                    target.name, change,
                )  # fmt: skip

    def guard_inputs(self, target: Target) -> None:
        """Any mode -> guarded by the inputs' covariance, whatever `svd_protect` is."""
        guard = self._activation_guard(target)
        if target.lowrank:
            self._to_full([target])
        target.guard = guard
        _switched(target)
        _log_counts("after its inputs were protected", target)

    def _to_lowrank(self, moves: Sequence[Move]) -> None:
        """Full -> low-rank. The switching step has been taken; the next one trains in part only."""
        forms = [self._form(move) for move in moves]  # all of them before any target changes
        _warn_of_zeros(moves, forms)
        for move in moves:
            _log_counts("before the switch to low-rank", move.target)
        for move, form in zip(moves, forms, strict=True):
            if isinstance(form, FactoredWeight):
                move.target.factors = form
            else:
                move.target.guard = form
        self._adapter.adopt([form for form in forms if isinstance(form, FactoredWeight)])
        for move in moves:
            _switched(move.target)
            _log_counts("after the switch to low-rank", move.target)

    def _form(self, move: Move) -> FactoredWeight | UpdateGuard:
        """What low-rank mode consists of for this matrix. Raises ValueError for an r outside [1, min(m, n))."""
        W, decomposition, protect = move.target.W, move.decomposition, self._config.svd_protect
        if protect == "activation":
            return self._activation_guard(move.target)
        assert decomposition is not None
        assert move.r is not None
        if protect == "core":
            return UpdateGuard.core(W, decomposition, move.r)
        return FactoredWeight.split(W, decomposition, move.r, protect)

    def _refactor(self, moves: Sequence[Move]) -> None:
        """Recompute everything from the current W."""
        if not self.needs_decomposition:
            return
        changed = []
        if self._config.svd_protect == "minor":
            _note_drift(moves)
        for move in moves:
            target, factors, decomposition = move.target, move.target.factors, move.decomposition
            assert decomposition is not None
            assert move.r is not None
            _log_counts("before refactoring", target)
            if factors is not None:
                changed.append(Refactored(factors, factors.B.data, factors.A.data))
                factors.refactor(decomposition, move.r, self._config.svd_protect)
            elif self._config.svd_protect == "core":
                target.guard = UpdateGuard.core(target.W, decomposition, move.r)
        self._adapter.refactored(changed)
        for move in moves:
            _log_counts("after refactoring", move.target)

    def _to_full(self, targets: Sequence[Target]) -> None:
        """Low-rank -> full."""
        for target in targets:
            _log_counts("before the switch to full", target)
        self._adapter.release([target.factors for target in targets if target.factors is not None])
        for target in targets:
            target.factors = target.guard = None
            _switched(target)
            _log_counts("after the switch to full", target)

    def _activation_guard(self, target: Target) -> UpdateGuard:
        config = self._config
        C = self.references[target.name]
        return UpdateGuard.activation(target.W, C, config.svd_protect_share, config.svd_protect_strength)


def _warn_of_zeros(moves: Sequence[Move], forms: Sequence[FactoredWeight | UpdateGuard]) -> None:
    """Read from the device once for all."""
    split = [(move, form.B) for move, form in zip(moves, forms, strict=True) if isinstance(form, FactoredWeight)]
    moving = torch.stack([B.detach().any() for _, B in split]).tolist() if split else []
    for (move, _), moves_on in zip(split, moving, strict=True):
        if not moves_on:
            logger.warning(
                "%s: the %d directions to train are exactly zero, and so are B and A and their gradients: it stands "
                "still until it is switched back", move.target.name, move.r,
            )  # fmt: skip


def _note_drift(moves: Sequence[Move]) -> None:
    """How far B and A have left the minor directions of the present W, which they are about to be put back into. Read
    from the device once for all; the decompositions have just been waited for anyway."""
    found = [
        (move.target, factor_drift(factors.B.detach(), factors.A.detach(), known.U[:, :k], known.V[:, :k]))
        for move in moves
        if (factors := move.target.factors) is not None and (known := move.decomposition) is not None
        if (k := known.S.numel() - factors.r) > 0
    ]
    if found:
        numbers = torch.stack([torch.stack(pair).double() for _, pair in found]).tolist()
        for (target, _), (drift_B, drift_A) in zip(found, numbers, strict=True):
            target.drift = {"drift_B": drift_B, "drift_A": drift_A}


def _switched(target: Target) -> None:
    target.num_switches += 1
    target.drift = {}
    target.analyses_in_mode = 0


def _log_counts(when: str, target: Target) -> None:
    """At debug level only: the split error reads the matrix back from the device."""
    if logger.isEnabledFor(logging.DEBUG):
        form, numel = target.form, target.W.numel()
        counts = ParameterCounts(matrix=numel, trainable=numel, frozen=0) if form is None else form.counts()
        logger.debug(
            "%s, %s: r=%d, matrix %d, trainable %d, frozen %d, total %d parameters, split error %.3g",
            target.name, when, target.num_free_directions, counts.matrix, counts.trainable, counts.frozen, counts.total,
            0.0 if form is None else form.split_error(),
        )  # fmt: skip
