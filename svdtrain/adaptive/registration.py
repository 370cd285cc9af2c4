"""Who owns B and A. `Reregister` puts them into the host optimizer in W's place."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.moments import State, UnknownState
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.stacks import states_between_factors, states_from_factors, states_to_factors
from svdtrain.adaptive.update_rules import is_muon, muon_scale

log = logging.getLogger(__name__)

Moments = Literal["map", "reset"]


@dataclass(frozen=True, eq=False)
class Refactored:
    """A low-rank matrix whose B and A were recomputed, and what they were before."""

    factors: FactoredWeight
    old_B: Tensor
    old_A: Tensor


class Adapter(Protocol):
    """How B and A are stepped. W and its state outside low-rank mode are always the host optimizer's.

    Matrices that change together come together, so that their state is mapped in few launches.
    """

    host_clears_gradients: bool
    """Whether `optimizer.zero_grad` still reaches the W of a low-rank matrix."""

    def adopt(self, entering: Sequence[FactoredWeight]) -> None:
        """These enter low-rank mode: their B and A are trained from now on."""
        ...

    def refactored(self, changed: Sequence[Refactored]) -> None:
        """Carry the moments of the old factors over to the new ones."""
        ...

    def release(self, leaving: Sequence[FactoredWeight]) -> None:
        """These go back to full mode."""
        ...

    def restore(self, lowrank: list[FactoredWeight]) -> None:
        """Take exactly these matrices as low-rank, without any moments: state is loaded afterwards."""
        ...

    def before_step(self) -> None:
        """Gradients of B and A are ready."""
        ...

    def after_step(self) -> None:
        """The host optimizer has stepped; W is merged from B and A next."""
        ...

    def check_full_update_norms(self) -> None:
        """Raise ValueError unless `full_update_norms` can tell."""
        ...

    def full_update_norms(self, lowrank: Sequence[FactoredWeight], W_before: Tensor) -> Tensor:
        """||dW||_F [N] that this step would have had in full mode, of N equal matrices; W_before [N, m, n]. Called
        between `after_step` and the merge."""
        ...

    def check_state(self, state: Mapping[str, Any], lowrank: Collection[str]) -> None:
        """Raise ValueError unless this is what this kind of adapter saves for these low-rank matrices, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that the host optimizer's own state_dict does not hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, after `restore`."""
        ...


class Reregister:
    """Puts B and A where W was: into the same param group, at W's place, so with W's hyperparameters.

    No group is added or removed, because torch's learning-rate schedulers refuse an optimizer whose number of groups
    changed. An optimizer that batches parameters must do so by shape within a group. The layout depends on which
    matrices are low-rank, never on the order in which they switched. State of every other parameter is never touched.
    """

    host_clears_gradients = False

    def __init__(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter], moments: Moments) -> None:
        """Raises ValueError when a target is not in the optimizer, or its state is not kept by parameter."""
        check_ownership(optimizer, targets)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS keeps one state for all parameters: svd_adapter=reregister cannot change them")
        self._optimizer = optimizer
        self._moments: Moments = moments
        target_ids = {id(W) for W in targets.values()}
        self._original: dict[int, list[nn.Parameter]] = {
            index: list(group["params"])
            for index, group in enumerate(optimizer.param_groups)
            if any(id(p) in target_ids for p in group["params"])
        }
        self._names = _parameter_names(optimizer)
        self._lowrank: dict[int, FactoredWeight] = {}
        self._last_laid_out: list[FactoredWeight] = []

    def adopt(self, entering: Sequence[FactoredWeight]) -> None:
        """Each W leaves the optimizer with its state; B and A join with the mapped state (or none after `reset`)."""
        if not entering:
            return
        states = [self._optimizer.state.pop(factors.W, None) for factors in entering]
        if self._moments == "map":
            with full_precision(entering[0].W.device):
                self._give(entering, states_to_factors(states, [_values(factors) for factors in entering]))
        self._lowrank |= {id(factors.W): factors for factors in entering}
        self._lay_out()

    def refactored(self, changed: Sequence[Refactored]) -> None:
        """Carry the moments from the old factors to the new ones, through their least-squares moment of W."""
        pairs = [self._take(one.factors) for one in changed]
        known = [i for i, (state_B, state_A) in enumerate(pairs) if state_B and state_A]
        if self._moments == "reset" or not known:
            return
        lowrank = [changed[i].factors for i in known]
        old = [(changed[i].old_B, changed[i].old_A) for i in known]
        with full_precision(lowrank[0].W.device):
            new = [_values(factors) for factors in lowrank]
            self._give(lowrank, states_between_factors([pairs[i] for i in known], old, new))

    def release(self, leaving: Sequence[FactoredWeight]) -> None:
        """B and A leave; W returns to its original place with moments by least squares (or none after `reset`)."""
        if not leaving:
            return
        pairs = [self._take(factors) for factors in leaving]
        for factors in leaving:
            del self._lowrank[id(factors.W)]
        self._lay_out()
        known = [i for i, (state_B, state_A) in enumerate(pairs) if state_B and state_A]
        if self._moments == "reset" or not known:
            return
        with full_precision(leaving[0].W.device):
            states = states_from_factors([pairs[i] for i in known], [_values(leaving[i]) for i in known])
        for i, state in zip(known, states, strict=True):
            if isinstance(state, UnknownState):
                _restarts(state)
            else:
                self._optimizer.state[leaving[i].W] = state

    def restore(self, lowrank: list[FactoredWeight]) -> None:
        """The layout for these low-rank matrices; `optimizer.load_state_dict` fits exactly afterwards. Where it came
        first and fitted the layout before, the state of B and A stays with them."""
        taken = {key: (factors, self._take(factors)) for key, factors in self._lowrank.items()}
        for factors in lowrank:
            self._optimizer.state.pop(factors.W, None)
            before, pair = taken.get(id(factors.W), (None, ({}, {})))
            if before is not None and before.r == factors.r and all(pair):
                self._optimizer.state[factors.B], self._optimizer.state[factors.A] = pair
        self._lowrank = {id(factors.W): factors for factors in lowrank}
        self._lay_out()

    def before_step(self) -> None:
        """Nothing to do: B and A are in the host's groups."""

    def after_step(self) -> None:
        """Nothing to do: the host optimizer stepped B and A."""

    def check_full_update_norms(self) -> None:
        """Raise ValueError unless all targets lie in groups of Muon."""
        if not all(is_muon(self._optimizer.param_groups[index]) for index in self._original):
            raise ValueError("svd_match_rms with svd_adapter=reregister needs Muon; use svd_adapter=shadow")

    def full_update_norms(self, lowrank: Sequence[FactoredWeight], W_before: Tensor) -> Tensor:
        """Known for Muon alone: lr x shape factor x min(m, n)^1/2."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        shape, norms = W_before.shape[1:], []
        for group in (groups[id(factors.B)] for factors in lowrank):
            assert is_muon(group), "check_full_update_norms"
            norms.append(float(group["lr"]) * muon_scale(shape, group) * min(shape) ** 0.5)
        return torch.tensor(norms, device=W_before.device)

    def check_state(self, state: Mapping[str, Any], lowrank: Collection[str]) -> None:
        """Raise ValueError where the moments of B and A lie in the state: they were shadow's."""
        if state:
            raise ValueError("this state was saved with svd_adapter=shadow; resume with the same adapter")

    def state_dict(self) -> dict[str, Any]:
        """Empty: everything is in the host optimizer's state_dict."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _lay_out(self) -> None:
        """Rebuild every param list from which matrices are low-rank."""
        factor_ids = {id(t) for factors in self._last_laid_out for t in (factors.B, factors.A)}
        expected = _ids(self._optimizer) - factor_ids
        for index, original in self._original.items():
            group = self._optimizer.param_groups[index]
            known = factor_ids | {id(p) for p in original}
            present = {id(p) for p in group["params"]} | {id(f.W) for f in self._last_laid_out}
            original[:] = [p for p in original if id(p) in present]  # taken out by the user since
            original += [p for p in group["params"] if id(p) not in known]  # added by the user since
            expected |= {id(p) for p in original}
            _set_params(group, [t for p in original for t in self._trained(p)], self._names | self._factor_names())
        for factors in self._lowrank.values():
            expected = expected - {id(factors.W)} | {id(factors.B), id(factors.A)}
        self._last_laid_out = list(self._lowrank.values())
        owned = [id(p) for group in self._optimizer.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)), "a parameter is in the optimizer twice"
        assert set(owned) == expected, "the optimizer's parameters are not exactly the trainable ones"

    def _trained(self, p: nn.Parameter) -> list[nn.Parameter]:
        """What stands in p's place: its factors in low-rank mode, itself otherwise."""
        factors = self._lowrank.get(id(p))
        return [p] if factors is None else [factors.B, factors.A]

    def _factor_names(self) -> dict[int, str]:
        names = {}
        for key, factors in self._lowrank.items():
            if key in self._names:
                names[id(factors.B)], names[id(factors.A)] = f"{self._names[key]}.B", f"{self._names[key]}.A"
        return names

    def _give(self, lowrank: Sequence[FactoredWeight], outcomes: Sequence[tuple[State, State] | UnknownState]) -> None:
        for factors, outcome in zip(lowrank, outcomes, strict=True):
            if isinstance(outcome, UnknownState):
                _restarts(outcome)
            elif all(outcome):
                self._optimizer.state[factors.B], self._optimizer.state[factors.A] = outcome

    def _take(self, factors: FactoredWeight) -> tuple[State, State]:
        """Remove the state of B and A from the optimizer; empty where it has none."""
        state = self._optimizer.state
        return state.pop(factors.B, None) or {}, state.pop(factors.A, None) or {}


def _values(factors: FactoredWeight) -> tuple[Tensor, Tensor]:
    return factors.B.detach(), factors.A.detach()


def _restarts(error: UnknownState) -> None:
    log.warning("the optimizer state of one matrix restarts from zero: %s", error)


def check_ownership(optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless the optimizer owns every target."""
    owned = _ids(optimizer)
    missing = [name for name, W in targets.items() if id(W) not in owned]
    if missing:
        raise ValueError(
            f"the optimizer does not own {len(missing)} of {len(targets)} targets, e.g. {missing[0]!r}; build the "
            "optimizer over these parameters, or narrow svd_targets"
        )


def _ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _parameter_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names that an optimizer built from `named_parameters()` keeps beside its parameters."""
    return {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def _set_params(group: dict[str, Any], params: list[nn.Parameter], names: Mapping[int, str]) -> None:
    group["params"][:] = params
    if names:
        group["param_names"] = [names[id(p)] for p in params if id(p) in names]
