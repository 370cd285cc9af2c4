"""AdaptiveSVD: which matrices are watched, when they are analysed, and how they change mode."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from svdtrain.adaptive.analysis import History, decompose_all, measure, starting_rank
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.policy import should_use_lowrank_training
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.targets import select_targets
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition

logger = logging.getLogger(__name__)

ChangeKind = Literal["to_lowrank", "to_full", "rank"]
_STATE_VERSION = 1
_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True)
class Change:
    """One matrix changed its mode or its rank. In full mode a rank is that of the whole matrix, g."""

    name: str
    kind: ChangeKind
    r_old: int
    r_new: int
    reason: str
    step: int
    diagnostics: dict[str, Any]

    def __str__(self) -> str:
        """`h.0.attn.c_q -> low-rank r=196: gradient_clobbering_risk`."""
        mode = "full" if self.kind == "to_full" else f"low-rank r={self.r_new}"
        return f"{self.name} -> {mode}: {self.reason}"


@dataclass(kw_only=True, eq=False)
class Target:
    """One watched matrix and everything known of it."""

    name: str
    W: nn.Parameter
    r: int | None = None
    """Rank in force, also while in full mode; None before the first analysis."""
    factors: FactoredWeight | None = None
    """Present in low-rank mode."""
    history: History | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    num_switches: int = 0

    @property
    def lowrank(self) -> bool:
        """Whether the optimizer owns B and A instead of W."""
        return self.factors is not None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        factors = self.factors
        return {
            "shape": list(self.W.shape),
            "r": self.r,
            "factors": None
            if factors is None
            else {"W_p": factors.W_p, "B": factors.B.detach(), "A": factors.A.detach()},
            "history": None if self.history is None else self.history.state_dict(),
            "metrics": dict(self.metrics),
            "num_switches": self.num_switches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.r, self.num_switches, self.metrics = state["r"], state["num_switches"], dict(state["metrics"])
        saved, past = state["factors"], state["history"]
        self.factors = None if saved is None else FactoredWeight.restored(self.W, **saved)
        self.history = None if past is None else History.from_state(past, self.W.device)


class AdaptiveSVD:
    """Watches matrices while they train and moves single ones between full and low-rank training.

    Call `project_gradients()` after backward (before clipping and the step) and `after_step(step)` after the step;
    or let `svdtrain.attach` do both through the optimizer's hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SVDConfig | None = None,
        *,
        adapter: Adapter | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """`log` gets one line per change. Raises ValueError when no parameter matches, a match is shared by two
        modules, the optimizer does not own a target, or it already has an AdaptiveSVD."""
        self.config = config or SVDConfig()
        if optimizer in _attached:
            raise ValueError("this optimizer already has an AdaptiveSVD; call detach() on that one first")
        found = select_targets(model, self.config.svd_targets)
        self.targets = {name: Target(name=name, W=W) for name, W in found.items()}
        self._optimizer = optimizer
        self._adapter: Adapter = adapter or Reregister(optimizer, found, self.config.svd_moments)
        self._log = log or logger.info
        self._events: list[dict[str, Any]] = []
        _attached.add(optimizer)

    # --- the training loop calls these ---

    def project_gradients(self) -> None:
        """B.grad and A.grad from G for every low-rank matrix; call once a step, with G averaged and complete."""
        for factors in self._lowrank():
            factors.project_gradient()
        self._adapter.before_step()

    def after_step(self, step: int, stepped: bool = True) -> list[Change]:
        """Write W from B and A; at `step % svd_interval == 0` analyse, decide and switch. `stepped=False`: the step was
        vetoed; nothing is merged or analysed. Gradients that `optimizer.zero_grad` cannot reach are dropped."""
        changes: list[Change] = []
        if stepped:
            self._adapter.after_step()
            for factors in self._lowrank():
                factors.merge()
            if self.config.svd_preset != "off" and step % self.config.svd_interval == 0:
                changes = self._analyse(step)
        self.clear_gradients()
        return changes

    def clear_gradients(self) -> None:
        """Drop W.grad, B.grad and A.grad of the low-rank matrices."""
        for factors in self._lowrank():
            factors.clear_gradients()

    def set_mode(self, name: str, r: int | None) -> None:
        """Switch one matrix by hand, between steps: to (or at) rank r, or back to full training with None.

        W is not written. Raises ValueError for an unknown name, an r outside [1, min(m, n)) or a matrix that cannot be
        decomposed. The policy may decide otherwise at the next analysis; `svd_switching=False` keeps it from that.
        """
        if name not in self.targets:
            raise ValueError(f"{name!r} is not watched; watched are: {', '.join(self.targets)}")
        target = self.targets[name]
        if r is None:
            if target.factors is not None:
                self._to_full(target)
            return
        (outcome,) = decompose_all([target.W])
        if isinstance(outcome, str):
            raise ValueError(f"{name!r} cannot be decomposed: {outcome}")
        change = self._refactor if target.lowrank else self._to_lowrank
        change(target, outcome, r)
        target.r = r

    # --- what it knows ---

    def metrics(self) -> dict[str, float]:
        """`svd/<name>/<metric>` of each matrix' last analysis; `mode` is 1 in low-rank mode. What could not be measured
        (no earlier analysis to compare with) is left out."""
        return {
            f"svd/{t.name}/{key}": value
            for t in self.targets.values()
            for key, value in t.metrics.items()
            if not math.isnan(value)
        }

    def events(self) -> list[dict[str, Any]]:
        """Warnings since the last call: level, step, name, message."""
        events, self._events = self._events, []
        return events

    def summary(self) -> dict[str, Any]:
        """Counts for a table: matrices watched, low-rank now, switches so far, ranks, trainable parameters."""
        lowrank = {t.name: t.factors for t in self.targets.values() if t.factors is not None}
        return {
            "num_targets": len(self.targets),
            "num_lowrank": len(lowrank),
            "num_switches": sum(t.num_switches for t in self.targets.values()),
            "ranks": {name: factors.r for name, factors in lowrank.items()},
            "num_trainable": sum(
                t.W.numel() if t.factors is None else t.factors.counts().trainable for t in self.targets.values()
            ),
            "num_parameters": sum(t.W.numel() for t in self.targets.values()),
        }

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trained factors: `<name>.B` [m, r] and `<name>.A` [r, n] of every low-rank matrix."""
        return {
            f"{t.name}.{letter}": getattr(t.factors, letter)
            for t in self.targets.values()
            if t.factors is not None
            for letter in ("B", "A")
        }

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only, fit for `torch.load(weights_only=True)`."""
        return {
            "version": _STATE_VERSION,
            "targets": {name: t.state_dict() for name, t in self.targets.items()},
            "adapter": self._adapter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore modes, ranks, factors and history. Load this before the optimizer's own state, whose layout depends
        on it; the model's weights may be loaded before or after. Raises ValueError for another model's state."""
        self.restore_layout(state)
        self._adapter.load_state_dict(state["adapter"])

    def restore_layout(self, state: Mapping[str, Any]) -> None:
        """The part of `load_state_dict` that makes a following `optimizer.load_state_dict` fit."""
        self._check_state(state)
        for name, target in self.targets.items():
            target.load_state_dict(state["targets"][name])
        self._adapter.restore(self._lowrank())

    def detach(self) -> None:
        """Back to plain training: every matrix in full mode in its original place, no trace in the optimizer."""
        for target in self.targets.values():
            if target.factors is not None:
                self._to_full(target)
        _attached.discard(self._optimizer)

    # --- analysis and switching ---

    def _lowrank(self) -> list[FactoredWeight]:
        return [t.factors for t in self.targets.values() if t.factors is not None]

    def _analyse(self, step: int) -> list[Change]:
        ready = [target for target in self.targets.values() if self._has_finite_numbers(target, step)]
        changes = []
        for target, outcome in zip(ready, decompose_all([t.W for t in ready]), strict=True):
            if isinstance(outcome, str):
                self._warn(step, target.name, f"decomposition failed ({outcome}); the last basis stays in force")
                continue
            change = self._decide(target, outcome, step)
            if change is not None:
                self._log(str(change))
                changes.append(change)
        return changes

    def _has_finite_numbers(self, target: Target, step: int) -> bool:
        if target.W.grad is None:
            self._warn(step, target.name, "no gradient at an analysis; skipped")
            return False
        for what, tensor in (("gradient", target.W.grad), ("weight", target.W)):
            if not bool(torch.isfinite(tensor).all()):
                self._warn(step, target.name, f"{what} is not finite; no analysis and no switch")
                return False
        return True

    def _decide(self, target: Target, decomposition: Decomposition, step: int) -> Change | None:
        """Measure, ask the policy, remember, act."""
        warming_up = step < self.config.svd_warmup and not target.lowrank
        r = target.r
        if r is None or warming_up:
            r = starting_rank(decomposition.S, self.config.svd_min_rank)
        assert target.W.grad is not None
        measured = measure(target.W, target.W.grad, decomposition, target.history, r=r, r_min=self.config.svd_min_rank)
        use_lowrank, r_next, diagnostics = should_use_lowrank_training(
            measured, self.config.thresholds, lowrank=target.lowrank, r=r, step=step, warmup=self.config.svd_warmup
        )
        if not self.config.svd_switching:
            use_lowrank = target.lowrank
        change = self._apply(target, decomposition, use_lowrank, r_next, diagnostics, step)
        target.r, target.history = r_next, History.of(target.W, decomposition, r_next)
        numbers = {key: float(value) for key, value in dataclasses.asdict(measured).items() if key != "r_next"}
        target.metrics = {**numbers, "r": float(r_next), "mode": float(target.lowrank)}
        return change

    def _apply(
        self,
        target: Target,
        decomposition: Decomposition,
        use_lowrank: bool,
        r: int,
        diagnostics: dict[str, Any],
        step: int,
    ) -> Change | None:
        """Bring the matrix into the decided mode and rank; None when neither changed."""
        before = target.factors.r if target.factors is not None else min(target.W.shape)
        if use_lowrank and target.factors is None:
            kind: ChangeKind = "to_lowrank"
            self._to_lowrank(target, decomposition, r)
        elif use_lowrank:
            kind = "rank"
            self._refactor(target, decomposition, r)
        elif target.factors is not None:
            kind = "to_full"
            self._to_full(target)
        else:
            return None
        after = target.factors.r if target.factors is not None else min(target.W.shape)
        if kind == "rank" and before == after:
            return None
        return Change(
            name=target.name, kind=kind, r_old=before, r_new=after,
            reason=diagnostics["reason"], step=step, diagnostics=diagnostics,
        )  # fmt: skip

    def _to_lowrank(self, target: Target, decomposition: Decomposition, r: int) -> None:
        target.factors = FactoredWeight.split(target.W, decomposition, r)
        self._adapter.adopt(target.factors)
        target.num_switches += 1
        _log_counts("split", target.name, target.factors)

    def _refactor(self, target: Target, decomposition: Decomposition, r: int) -> None:
        factors = target.factors
        assert factors is not None
        _log_counts("before refactoring", target.name, factors)
        old_B, old_A = factors.B.data, factors.A.data
        factors.refactor(decomposition, r)
        self._adapter.refactored(factors, old_B, old_A)
        _log_counts("refactored", target.name, factors)

    def _to_full(self, target: Target) -> None:
        assert target.factors is not None
        _log_counts("before full training", target.name, target.factors)
        self._adapter.release(target.factors)
        target.factors = None
        target.num_switches += 1

    def _warn(self, step: int, name: str, message: str) -> None:
        logger.warning("step %d, %s: %s", step, name, message)
        self._events.append({"level": "WARNING", "step": step, "name": name, "message": message})

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"SVD state has version {state.get('version')}, this program reads {_STATE_VERSION}")
        saved = {name: tuple(values["shape"]) for name, values in state["targets"].items()}
        own = {name: tuple(target.W.shape) for name, target in self.targets.items()}
        if saved != own:
            differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
            raise ValueError(
                f"SVD state of another model or other svd_targets: {len(differing)} matrices differ, e.g. "
                f"{differing[0]}: saved {saved.get(differing[0])}, here {own.get(differing[0])}"
            )


def _log_counts(when: str, name: str, factors: FactoredWeight) -> None:
    """At debug level only: the split error reads the matrix back from the device."""
    if logger.isEnabledFor(logging.DEBUG):
        counts = factors.counts()
        logger.debug(
            "%s: %s r=%d, matrix %d, trainable %d, frozen %d, total %d parameters, split error %.3g",
            name, when, factors.r, counts.matrix, counts.trainable, counts.frozen, counts.total, factors.split_error(),
        )  # fmt: skip
