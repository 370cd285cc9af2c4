"""Moving one matrix between full and low-rank mode, with its optimizer state."""

from __future__ import annotations

import logging

from torch import Tensor

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.adaptive.registration import Adapter
from svdtrain.adaptive.target import Target
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition

logger = logging.getLogger(__name__)
GUARDED = frozenset({"core", "activation"})


class Transitions:
    """Carries out what was decided. W is never written here."""

    def __init__(self, config: SVDConfig, adapter: Adapter) -> None:
        """`references` holds E[x x^T] by matrix name, for protect=activation."""
        self._config = config
        self._adapter = adapter
        self.references: dict[str, Tensor] = {}

    def set_references(self, covariances: dict[str, Tensor], targets: dict[str, Target]) -> None:
        """New covariances; matrices that are guarded by activation now get their new guard at once."""
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

    def to_lowrank(self, target: Target, decomposition: Decomposition | None, r: int) -> None:
        """Full -> low-rank. The switching step has been taken; the next one trains in part only."""
        protect = self._config.svd_protect
        if protect == "activation":
            target.guard = self._activation_guard(target)
            _switched(target)
            _log_counts("after the switch to low-rank", target)
            return
        assert decomposition is not None
        if protect == "core":
            target.guard = UpdateGuard.core(target.W, decomposition, r)
        else:
            target.factors = FactoredWeight.split(target.W, decomposition, r, protect)
            self._adapter.adopt(target.factors)
        _switched(target)
        _log_counts("after the switch to low-rank", target)

    def guard_inputs(self, target: Target) -> None:
        """Any mode -> guarded by the inputs' covariance, whatever `svd_protect` is."""
        guard = self._activation_guard(target)
        if target.lowrank:
            self.to_full(target)
        target.guard = guard
        _switched(target)
        _log_counts("after its inputs were protected", target)

    def refactor(self, target: Target, decomposition: Decomposition | None, r: int) -> None:
        """Recompute everything from the current W at rank r."""
        if not self.needs_decomposition:
            return
        assert decomposition is not None
        _log_counts("before refactoring", target)
        if target.factors is not None:
            old_B, old_A = target.factors.B.data, target.factors.A.data
            target.factors.refactor(decomposition, r, self._config.svd_protect)
            self._adapter.refactored(target.factors, old_B, old_A)
        elif self._config.svd_protect == "core":
            target.guard = UpdateGuard.core(target.W, decomposition, r)
        _log_counts("after refactoring", target)

    def to_full(self, target: Target) -> None:
        """Low-rank -> full."""
        _log_counts("before the switch to full", target)
        if target.factors is not None:
            self._adapter.release(target.factors)
        target.factors = target.guard = None
        _switched(target)

    def _activation_guard(self, target: Target) -> UpdateGuard:
        config = self._config
        C = self.references[target.name]
        return UpdateGuard.activation(target.W, C, config.svd_protect_share, config.svd_protect_strength)


def _switched(target: Target) -> None:
    target.num_switches += 1
    target.analyses_in_mode = 0


def _log_counts(when: str, target: Target) -> None:
    """At debug level only: the split error reads the matrix back from the device."""
    form = target.form
    if form is not None and logger.isEnabledFor(logging.DEBUG):
        counts = form.counts()
        logger.debug(
            "%s, %s: r=%d, matrix %d, trainable %d, frozen %d, total %d parameters, split error %.3g",
            target.name, when, form.r, counts.matrix, counts.trainable, counts.frozen, counts.total, form.split_error(),
        )  # fmt: skip
