"""AdaptiveSVD: which matrices are watched, when they are analysed, and how they change mode."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.analysis import History, decompose_all, measure, starting_rank
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.adaptive.policy import CALIBRATED_PRESETS, Measurement, should_use_lowrank_training
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.shadow import Shadow
from svdtrain.adaptive.target import Change, ChangeKind, Target
from svdtrain.adaptive.targets import select_targets
from svdtrain.adaptive.transitions import Transitions
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition

logger = logging.getLogger(__name__)

_STATE_VERSION = 1
_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


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
        self._adapter: Adapter = adapter or self._default_adapter(optimizer, found)
        self._transitions = Transitions(self.config, self._adapter)
        self.held: set[str] = set()
        """Matrices that keep their mode whatever the policy says: an alarm has put them there."""
        self._interference: dict[str, float] = {}
        self._log = log or logger.info
        self._events: list[dict[str, Any]] = []
        _attached.add(optimizer)

    def _default_adapter(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter]) -> Adapter:
        kind = Shadow if self.config.svd_adapter == "shadow" else Reregister
        return kind(optimizer, targets, self.config.svd_moments)

    # --- the training loop calls these ---

    def project_gradients(self) -> None:
        """B.grad and A.grad from G for every low-rank matrix; call once a step, with G averaged and complete."""
        for factors in self._factors():
            factors.project_gradient()
            if self.config.svd_match_rms:
                factors.remember()
        for guard in self._guards():
            guard.before_step()
        self._adapter.before_step()

    def after_step(self, step: int, stepped: bool = True) -> list[Change]:
        """Write W from B and A; at `step % svd_interval == 0` analyse, decide and switch. `stepped=False`: the step was
        vetoed; nothing is merged or analysed. Gradients that `optimizer.zero_grad` cannot reach are dropped."""
        changes: list[Change] = []
        if stepped:
            self._apply_step()
            if self.config.svd_preset != "off" and step % self.config.svd_interval == 0:
                changes = self._analyse(step)
        self.clear_gradients()
        return changes

    def _apply_step(self) -> None:
        self._adapter.after_step()
        for factors in self._factors():
            if self.config.svd_match_rms and factors.B.grad is not None:
                factors.match_update(partial(self._adapter.full_update_norm, factors))
            factors.merge()
        for guard in self._guards():
            guard.after_step(match_rms=self.config.svd_match_rms)

    def clear_gradients(self) -> None:
        """Drop B.grad and A.grad of the low-rank matrices, and W.grad where the host's zero_grad misses it."""
        for factors in self._factors():
            factors.clear_gradients()
            if not self._adapter.host_clears_gradients:
                factors.W.grad = None

    def set_mode(self, name: str, r: int | None) -> None:
        """Switch one matrix by hand, between steps: to (or at) rank r, or back to full training with None.

        W is not written. Raises ValueError for an unknown name, an r outside [1, min(m, n)) or a matrix that cannot be
        decomposed. The policy may decide otherwise at the next analysis; `svd_switching=False` keeps it from that.
        """
        if name not in self.targets:
            raise ValueError(f"{name!r} is not watched; watched are: {', '.join(self.targets)}")
        target = self.targets[name]
        if r is None:
            if target.lowrank:
                self._transitions.to_full(target)
            return
        if not self._transitions.possible(target):
            raise ValueError(f"{name!r}: protect=activation needs set_references() first")
        (outcome,) = decompose_all([target.W])
        if isinstance(outcome, str):
            raise ValueError(f"{name!r} cannot be decomposed: {outcome}")
        (self._transitions.refactor if target.lowrank else self._transitions.to_lowrank)(target, outcome, r)
        target.r = r

    def protect_inputs(self, name: str) -> None:
        """Keep the updates of one matrix out of its principal inputs on the reference data (SPECTRAL section 5), from
        the next step on and whatever svd_protect is; `set_mode(name, None)` ends it. Raises ValueError for an unknown
        name or one without `set_references`."""
        if name not in self.targets:
            raise ValueError(f"{name!r} is not watched; watched are: {', '.join(self.targets)}")
        if name not in self._transitions.references:
            raise ValueError(f"{name!r}: protecting its inputs needs set_references() first")
        self._transitions.guard_inputs(self.targets[name])

    def set_references(self, covariances: Mapping[str, Tensor]) -> None:
        """E[x x^T] [n, n] of each matrix' inputs on reference data, by short name, for protect=activation. Raises
        ValueError for a name that is not watched."""
        unknown = set(covariances) - set(self.targets)
        if unknown:
            raise ValueError(f"not watched: {sorted(unknown)[:3]}; watched are: {', '.join(self.targets)}")
        self._transitions.set_references({name: C.detach().clone() for name, C in covariances.items()}, self.targets)

    def note_interference(self, nats: Mapping[str, float]) -> None:
        """<G_ref, dW> by short name, for the next analysis only: the calibrated rule lets what does no harm pass."""
        self._interference.update(nats)

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
        lowrank = {t.name: t.form for t in self.targets.values() if t.form is not None}
        return {
            "num_targets": len(self.targets),
            "num_lowrank": len(lowrank),
            "num_switches": sum(t.num_switches for t in self.targets.values()),
            "ranks": {name: form.r for name, form in lowrank.items()},
            "num_trainable": sum(
                t.W.numel() if t.form is None else t.form.counts().trainable for t in self.targets.values()
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
            "protect": self.config.svd_protect,
            "targets": {name: t.state_dict() for name, t in self.targets.items()},
            "adapter": self._adapter.state_dict(),
            "references": dict(self._transitions.references),
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
        self._transitions.references = {
            name: C.to(self.targets[name].W.device, copy=True) for name, C in state["references"].items()
        }
        self._adapter.restore(self._factors())

    def detach(self) -> None:
        """Back to plain training: every matrix in full mode in its original place, no trace in the optimizer."""
        for target in self.targets.values():
            if target.lowrank:
                self._transitions.to_full(target)
        _attached.discard(self._optimizer)

    # --- analysis and switching ---

    def _factors(self) -> list[FactoredWeight]:
        return [t.factors for t in self.targets.values() if t.factors is not None]

    def _guards(self) -> list[UpdateGuard]:
        return [t.guard for t in self.targets.values() if t.guard is not None]

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
        self._interference.clear()
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
        measured = dataclasses.replace(measured, interference=self._interference.get(target.name, math.nan))
        use_lowrank, r_next, diagnostics = self._ask_policy(target, measured, r, step)
        change = self._apply(target, decomposition, use_lowrank, r_next, diagnostics, step)
        target.r, target.history = r_next, History.of(target.W, decomposition, r_next)
        numbers = {key: float(value) for key, value in dataclasses.asdict(measured).items() if key != "r_next"}
        target.metrics = {**numbers, "r": float(r_next), "mode": float(target.lowrank)}
        return change

    def _ask_policy(self, target: Target, measured: Measurement, r: int, step: int) -> tuple[bool, int, dict[str, Any]]:
        config = self.config
        target.analyses_in_mode += 1
        use_lowrank, r_next, diagnostics = should_use_lowrank_training(
            measured,
            config.thresholds,
            lowrank=target.lowrank,
            r=r,
            step=step,
            warmup=config.svd_warmup,
            calibrated=CALIBRATED_PRESETS[config.svd_preset] if config.svd_rule == "calibrated" else None,
            analyses_in_mode=target.analyses_in_mode if target.num_switches else None,
            min_dwell=config.svd_min_dwell,
        )
        logger.debug("step %d, %s: %s", step, target.name, diagnostics)
        if not config.svd_switching or target.name in self.held:
            use_lowrank = target.lowrank
        elif use_lowrank and not self._transitions.possible(target):
            self._warn(step, target.name, "protect=activation, but nothing is known of its inputs: it stays full")
            use_lowrank = target.lowrank
        return use_lowrank, r_next, diagnostics

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
        before = target.num_free_directions
        kind: ChangeKind = "rank" if target.lowrank == use_lowrank else ("to_lowrank" if use_lowrank else "to_full")
        if kind == "to_full":
            self._transitions.to_full(target)
        elif kind == "to_lowrank":
            self._transitions.to_lowrank(target, decomposition, r)
        elif use_lowrank:
            self._transitions.refactor(target, decomposition, r)
        if kind == "rank" and before == target.num_free_directions:
            return None
        return Change(
            name=target.name, kind=kind, r_old=before, r_new=target.num_free_directions,
            reason=diagnostics["reason"], step=step, diagnostics=diagnostics,
        )  # fmt: skip

    def _warn(self, step: int, name: str, message: str) -> None:
        logger.warning("step %d, %s: %s", step, name, message)
        self._events.append({"level": "WARNING", "step": step, "name": name, "message": message})

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"SVD state has version {state.get('version')}, this program reads {_STATE_VERSION}")
        if state["protect"] != self.config.svd_protect:
            raise ValueError(
                f"SVD state was saved with svd_protect={state['protect']}, here it is {self.config.svd_protect}; "
                "resume with the same setting"
            )
        saved = {name: tuple(values["shape"]) for name, values in state["targets"].items()}
        own = {name: tuple(target.W.shape) for name, target in self.targets.items()}
        if saved != own:
            differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
            raise ValueError(
                f"SVD state of another model or other svd_targets: {len(differing)} matrices differ, e.g. "
                f"{differing[0]}: saved {saved.get(differing[0])}, here {own.get(differing[0])}"
            )
