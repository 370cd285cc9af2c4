"""AdaptiveSVD: which matrices are watched, when they are analysed, and how they change mode."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive import products
from svdtrain.adaptive.analysis import History, decompose_all, measure, starting_rank
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.adaptive.monitor import Monitor
from svdtrain.adaptive.policy import Measurement, should_use_lowrank_training
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.shadow import Shadow
from svdtrain.adaptive.sharded import refuse_sharded
from svdtrain.adaptive.target import STATE_VERSION, Change, Decision, Target, change_made, check_state, totals
from svdtrain.adaptive.targets import select_targets
from svdtrain.adaptive.transitions import Move, Transitions
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition

logger = logging.getLogger(__name__)

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
        group: Any = None,
    ) -> None:
        """`log` gets one line per change. `group`: a process group whose ranks all make the same calls; the tracked
        analyses are shared over it. Raises ValueError when no parameter matches, a match is shared by two
        modules, the optimizer does not own a target, or it already has an AdaptiveSVD."""
        self.config = config or SVDConfig()
        if optimizer in _attached:
            raise ValueError("this optimizer already has an AdaptiveSVD; call detach() on that one first")
        found = self._take(select_targets(model, self.config.svd_targets))
        self.targets = {name: Target(name=name, W=W) for name, W in found.items()}
        self._optimizer = optimizer
        self._adapter: Adapter = adapter or self._default_adapter(optimizer, found)
        self.optimizer_has_factors = not self._adapter.host_clears_gradients
        """Whether B and A stand in the optimizer in W's place; else they are stepped beside it."""
        self._transitions = Transitions(self.config, self._adapter)
        self.watching = self.config.svd_preset != "off"
        """Set it to False to look at nothing and decide nothing for a while; low-rank matrices train on as they are."""
        tracked = self.watching and self.config.svd_engine == "tracked"
        self._monitor = Monitor(self.config, self.targets, group) if tracked else None
        self.held: set[str] = set()
        """Matrices that keep their mode whatever the policy says: an alarm has put them there."""
        self._interference: dict[str, float] = {}
        self._before: list[products.Before] = []
        self._log = log or logger.info
        self._events: list[dict[str, Any]] = []
        _attached.add(optimizer)

    _take = staticmethod(refuse_sharded)

    def _default_adapter(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter]) -> Adapter:
        kind = Shadow if self.config.svd_adapter == "shadow" else Reregister
        return kind(optimizer, targets, self.config.svd_moments)

    # --- the training loop calls these ---

    def keep_foreign_writes(self, *, wait: bool = False) -> None:
        """Before a step: what others have written to a low-rank W stays. `wait`: see `Transitions`."""
        self._transitions.keep_foreign_writes(self.targets.values(), wait=wait)

    def project_gradients(self) -> None:
        """B.grad and A.grad from G for every low-rank matrix; call once a step, with G averaged and complete."""
        self._keep_weights()
        products.project_gradients(self._factors())
        self._adapter.before_step()

    def _keep_weights(self) -> None:
        """As they are before anything of the step has moved."""
        self._before = products.remember(self._factors()) if self.config.svd_match_rms else []
        for guard in self._guards():
            guard.before_step()

    def after_step(self, step: int, stepped: bool = True) -> list[Change]:
        """Write W from B and A; look at every matrix; at `step % svd_interval == 0` decide and switch. `stepped=False`:
        the step was vetoed; nothing is merged or looked at. Gradients that zero_grad cannot reach are dropped."""
        changes: list[Change] = []
        if stepped:
            self._apply_step()
            deciding = step % self.config.svd_interval == 0
            if self.watching and self._monitor is not None:
                changes = self._watch(self._monitor, step, deciding)
            elif self.watching and deciding:
                changes = self._analyse(step)
        self.clear_gradients()
        self._before = []
        return changes

    def _watch(self, monitor: Monitor, step: int, deciding: bool) -> list[Change]:
        """The tracked engine's share of a step: take what the last step measured, look again, decide, analyse."""
        device = next(iter(self.targets.values())).W.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):  # an optimizer may be stepped inside autocast
            monitor.collect(step)
            if step % self.config.svd_monitor_every == 0:
                monitor.observe(step, with_gradients=self.gradients_agree(step))
            changes = self._decide_tracked(monitor, step) if deciding else []
            monitor.analyse(step)
        return changes

    def gradients_agree(self, step: int) -> bool:
        """Whether W.grad is the same on every rank at this step, so that it may be looked at."""
        return True

    def _apply_step(self) -> None:
        self._adapter.after_step()
        products.match_updates(self._before, self._adapter.full_update_norms)
        products.merge(self._factors())
        for guard in self._guards():
            guard.after_step(match_rms=self.config.svd_match_rms)

    def clear_gradients(self) -> None:
        """Drop B.grad and A.grad of the low-rank matrices, and W.grad where the host's zero_grad misses it."""
        for factors in self._factors():
            factors.clear_gradients()
            if self.optimizer_has_factors:
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
            self._transitions.carry_out([Move(target=target, r=None)])
            return
        if not self._transitions.possible(target):
            raise ValueError(f"{name!r}: protect=activation needs set_references() first")
        (outcome,) = decompose_all([target.W])
        if isinstance(outcome, str):
            raise ValueError(f"{name!r} cannot be decomposed: {outcome}")
        self._transitions.carry_out([Move(target=target, r=r, decomposition=outcome)])
        self.analyse_at(name, r)

    def analyse_at(self, name: str, r: int | None) -> None:
        """The rank that the next decision starts from, whatever the mode; None: as if there had been no decision."""
        self.targets[name].r = r
        if self._monitor is not None and r is not None:
            self._monitor.set_ranks({name: r})

    def protect_inputs(self, name: str) -> None:
        """Keep the updates of one matrix out of its principal inputs on the reference data (spectral/activations), from
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

    def step_metrics(self) -> dict[str, float | str]:
        """`svd_step/...`: the look at all matrices that arrived in the last `after_step` in a dozen numbers (median and
        largest lift, largest z, who has it, for update and gradient); `of_step` says which step it was taken at."""
        return {} if self._monitor is None else self._monitor.step_metrics()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes added by the tracked engine and by low-rank mode, by kind."""
        held = {} if self._monitor is None else self._monitor.tracker.memory_bytes()
        forms = [t.form for t in self.targets.values() if t.form is not None]
        return held | {"lowrank": sum(form.nbytes for form in forms)}

    def events(self) -> list[dict[str, Any]]:
        """Warnings since the last call: level, step, name, message."""
        events, self._events = self._events, []
        return events

    def summary(self) -> dict[str, Any]:
        """Counts for a table: matrices watched, low-rank now, switches so far, ranks, trainable parameters."""
        return totals(self.targets.values())

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
            "version": STATE_VERSION,
            "protect": self.config.svd_protect,
            "targets": {name: t.state_dict() for name, t in self.targets.items()},
            "adapter": self._adapter.state_dict(),
            "references": dict(self._transitions.references),
            "monitor": None if self._monitor is None else self._monitor.state_dict(),
            "interference": dict(self._interference),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore modes, ranks, factors and history. Load this before the optimizer's own state, whose layout depends
        on it; the model's weights may be loaded before or after. Raises ValueError for another model's state."""
        self.restore_layout(state)
        self._adapter.load_state_dict(state["adapter"])
        self._interference = dict(state["interference"])

    def restore_layout(self, state: Mapping[str, Any]) -> None:
        """The part of `load_state_dict` that makes a following `optimizer.load_state_dict` fit."""
        check_state(state, self.targets, self.config.svd_protect)
        lowrank = [name for name, saved in state["targets"].items() if saved["factors"] is not None]
        self._adapter.check_state(state["adapter"], lowrank)
        for name, target in self.targets.items():
            target.load_state_dict(state["targets"][name])
        self._transitions.references = {
            name: C.to(self.targets[name].W.device, copy=True) for name, C in state["references"].items()
        }
        self._adapter.restore(self._factors())
        if self._monitor is not None and state.get("monitor") is not None:
            self._monitor.load_state_dict(state["monitor"])

    def detach(self) -> None:
        """Back to plain training: every matrix in full mode in its original place, no trace in the optimizer."""
        self._transitions.carry_out([Move(target=target, r=None) for target in self.targets.values()])
        _attached.discard(self._optimizer)

    # --- analysis and switching ---

    def _factors(self) -> list[FactoredWeight]:
        return [t.factors for t in self.targets.values() if t.factors is not None]

    def _guards(self) -> list[UpdateGuard]:
        return [t.guard for t in self.targets.values() if t.guard is not None]

    def _analyse(self, step: int) -> list[Change]:
        """The exact engine: decompose everything, then decide matrix by matrix."""
        ready = [target for target in self.targets.values() if self._has_finite_numbers(target, step)]
        found = self._decompose(ready, step, "the last basis stays in force")
        decisions = []
        for target in (target for target in ready if target.name in found):
            S = found[target.name].S
            r = self._rank_in_force(target, step, lambda S=S: starting_rank(S, self.config.svd_min_rank))
            assert target.W.grad is not None
            measured = measure(
                target.W, target.W.grad, found[target.name], target.history, r=r, r_min=self.config.svd_min_rank
            )
            decisions.append(self._decide(target, measured, r, step))
        changes = self._apply(decisions, {t.name: found[t.name] for t in self._recomputed(decisions)}, step)
        for decision in decisions:
            decision.target.history = History.of(decision.target.W, found[decision.target.name], decision.r)
            self._remember(decision)
        return self._report(changes)

    def _decide_tracked(self, monitor: Monitor, step: int) -> list[Change]:
        """The tracked engine: decide from what it measured up to the step before; decompose, all together, only what
        the decisions recompute."""
        decisions = []
        for target in self.targets.values():
            trouble = "no gradient at an analysis; skipped" if target.W.grad is None else monitor.trouble(target.name)
            if trouble is None:
                r = self._rank_in_force(target, step, lambda name=target.name: monitor.starting_rank(name))
                decisions.append(self._decide(target, monitor.measure(target.name, r), r, step))
            elif trouble:
                self._warn(step, target.name, trouble)
        recompute = self._recomputed(decisions)
        found = self._decompose(recompute, step, "it stays as it is")
        failed = {target.name for target in recompute} - found.keys()
        decisions = [decision for decision in decisions if decision.target.name not in failed]
        changes = self._apply(decisions, found, step)
        for decision in decisions:
            self._remember(decision, monitor.extras(decision.target.name))
        monitor.set_ranks({t.name: t.r for t in self.targets.values() if t.r is not None})
        monitor.install(found, step)
        return self._report(changes)

    def _recomputed(self, decisions: list[Decision]) -> list[Target]:
        """Whose split is computed anew, from an exact decomposition."""
        wanted = [d.target for d in decisions if d.recomputes(self.config.recompute_every)]
        return wanted if self._transitions.needs_decomposition else []

    def _decompose(self, targets: list[Target], step: int, otherwise: str) -> dict[str, Decomposition]:
        """All of them together; a warning that says what happens `otherwise` where it fails."""
        found: dict[str, Decomposition] = {}
        outcomes = decompose_all([t.W for t in targets]) if targets else []
        for target, outcome in zip(targets, outcomes, strict=True):
            if isinstance(outcome, str):
                self._warn(step, target.name, f"decomposition failed ({outcome}); {otherwise}")
            else:
                found[target.name] = outcome
        return found

    def _report(self, changes: list[Change]) -> list[Change]:
        """End of a decision: what changed, logged."""
        self._interference.clear()
        for change in changes:
            self._log(str(change))
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

    def _rank_in_force(self, target: Target, step: int, start: Callable[[], int]) -> int:
        """r of the last decision; `start()` before the first one and while warming up."""
        warming_up = step < self.config.svd_warmup and not target.lowrank
        return start() if target.r is None or warming_up else target.r

    def _decide(self, target: Target, measured: Measurement, r: int, step: int) -> Decision:
        if target.name in self._interference:
            measured = dataclasses.replace(measured, interference=self._interference[target.name])
        return Decision(target, measured, *self._ask_policy(target, measured, r, step))

    def _remember(self, decision: Decision, extras: Mapping[str, float] | None = None) -> None:
        target = decision.target
        target.r = decision.r
        numbers = {key: float(value) for key, value in vars(decision.measured).items() if key != "r_next"}  # no copies
        state = {"r": float(decision.r), "mode": float(target.lowrank)}
        target.metrics = {**numbers, **(extras or {}), **target.drift, **state}

    def _ask_policy(self, target: Target, measured: Measurement, r: int, step: int) -> tuple[bool, int, dict[str, Any]]:
        config = self.config
        target.analyses_in_mode += 1
        use_lowrank, r_next, diagnostics = should_use_lowrank_training(
            measured, config.thresholds, lowrank=target.lowrank, r=r, step=step, warmup=config.svd_warmup,
            calibrated=config.calibrated, min_dwell=config.svd_min_dwell,
            analyses_in_mode=target.analyses_in_mode if target.num_switches else None,
        )  # fmt: skip
        logger.debug("step %d, %s: %s", step, target.name, diagnostics)
        if not config.svd_switching or target.name in self.held:
            use_lowrank = target.lowrank
        elif use_lowrank and not self._transitions.possible(target):
            self._warn(step, target.name, "protect=activation, but nothing is known of its inputs: it stays full")
            use_lowrank = target.lowrank
        return use_lowrank, r_next, diagnostics

    def _apply(self, decisions: list[Decision], found: Mapping[str, Decomposition], step: int) -> list[Change]:
        """Bring all into the decided modes and ranks; what stays low-rank and is not in `found` keeps its split."""
        before = [(d.target.lowrank, d.target.num_free_directions) for d in decisions]
        moving = [d for d in decisions if not (d.use_lowrank and d.target.lowrank) or d.target.name in found]
        moves = [Move(target=d.target, r=d.new_rank, decomposition=found.get(d.target.name)) for d in moving]
        self._transitions.carry_out(moves)
        changes = (change_made(d, *then, step) for d, then in zip(decisions, before, strict=True))
        return [change for change in changes if change is not None]

    def _warn(self, step: int, name: str, message: str) -> None:
        logger.warning("step %d, %s: %s", step, name, message)
        self._events.append({"level": "WARNING", "step": step, "name": name, "message": message})
