"""`Shadow`: the host optimizer keeps W, steps it and never learns of B and A."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.moments import UnknownState
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.registration import Moments, Refactored, check_ownership
from svdtrain.adaptive.sharded import whole
from svdtrain.adaptive.stacks import states_between_factors, states_to_factors
from svdtrain.adaptive.update_rules import State, has_own_rule, rule_for

log = logging.getLogger(__name__)


class Shadow:
    """Steps B and A itself, under the current hyperparameters of W's group, and lets W be written afterwards.

    The host's groups, state, compiled step and checkpoint format never change, whatever optimizer it is: what it writes
    to a low-rank W is overwritten by W_p + B A. Its state for W stays warm for the way back. The price is the host's
    state for W, kept in low-rank mode too.
    """

    host_clears_gradients = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        targets: Mapping[str, nn.Parameter],
        moments: Moments,
        owned: Mapping[str, nn.Parameter] | None = None,
        *,
        everywhere: Callable[[list[bool]], list[bool]] = list,
    ) -> None:
        """`owned`: what the optimizer has in the place of each target, where that is not the target itself (shards).
        `everywhere`: which of some things hold on every rank; every rank asks at the same changes.
        Raises ValueError when a target is not in the optimizer or its group has no learning rate; warns where the
        optimizer's rule is none that B and A can be stepped by."""
        check_ownership(optimizer, owned or targets)
        self._owned = {id(W): (owned or targets)[name] for name, W in targets.items()}
        _check_rules(optimizer, {id(p) for p in self._owned.values()})
        self._optimizer = optimizer
        self._moments: Moments = moments
        self._everywhere = everywhere
        self._names = {id(W): name for name, W in targets.items()}
        self._lowrank: dict[str, FactoredWeight] = {}
        self._state: dict[str, tuple[State, State]] = {}

    def adopt(self, entering: Sequence[FactoredWeight]) -> None:
        """Start from the host's moments of W, where it keeps them per parameter; else from none."""
        self._lowrank |= {self._name(factors): factors for factors in entering}
        for factors, state in zip(entering, self._from_host(entering), strict=True):
            self._state[self._name(factors)] = state or ({}, {})

    def refactored(self, changed: Sequence[Refactored]) -> None:
        """Map the host's moments of W, which have seen every gradient, onto the new factors; where the host keeps them
        in a form of its own, carry the old factors' moments over through their least-squares moment of W."""
        own = []
        for one, state in zip(changed, self._from_host([one.factors for one in changed]), strict=True):
            name = self._name(one.factors)
            if state is None and self._moments == "map" and all(self._state[name]):
                own.append(one)
            else:
                self._state[name] = state or ({}, {})
        self._carry_over(own)

    def release(self, leaving: Sequence[FactoredWeight]) -> None:
        """The host goes on with W and the moments that it has kept."""
        for factors in leaving:
            del self._lowrank[self._name(factors)], self._state[self._name(factors)]

    def restore(self, lowrank: list[FactoredWeight]) -> None:
        """These matrices are low-rank; their state comes with `load_state_dict`."""
        self._lowrank = {self._names[id(factors.W)]: factors for factors in lowrank}
        self._state = {name: ({}, {}) for name in self._lowrank}

    def before_step(self) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Step B and A where there is a gradient, those of one group together. They come in the order of the targets,
        not in that of their switches: every rank and every resumed run forms the same stacks."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        together: dict[int, list[tuple[nn.Parameter, State]]] = {}
        for name in (name for name in self._names.values() if name in self._lowrank):
            factors = self._lowrank[name]
            if id(self._owned[id(factors.W)]) not in groups:  # taken out by the host, which so leaves it as it is
                continue
            pairs = zip((factors.B, factors.A), self._state[name], strict=True)
            mine = together.setdefault(id(groups[id(self._owned[id(factors.W)])]), [])
            mine += [(p, state) for p, state in pairs if p.grad is not None]
        for group in self._optimizer.param_groups:
            if together.get(id(group)):
                step, _ = rule_for(group, self._optimizer)
                params, states = zip(*together[id(group)], strict=True)
                step(params, states, group)

    def check_full_update_norms(self) -> None:
        """Nothing to do: the host takes the full step each time."""

    def full_update_norms(self, lowrank: Sequence[FactoredWeight], W_before: Tensor) -> Tensor:
        """||dW||_F of the step that the host has just taken with each W."""
        return torch.linalg.vector_norm(torch.stack([factors.W for factors in lowrank]) - W_before, dim=(-2, -1))

    def state_dict(self) -> dict[str, Any]:
        """The moments of B and A by matrix."""
        return {name: {"B": dict(B), "A": dict(A)} for name, (B, A) in self._state.items()}

    def check_state(self, state: Mapping[str, Any], lowrank: Collection[str]) -> None:
        """Raise ValueError when it does not belong to these low-rank matrices."""
        if set(state) != set(lowrank):
            raise ValueError("no moments of B and A in this state: it was saved with another svd_adapter; use that one")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._state = {name: (_own(parts["B"]), _own(parts["A"])) for name, parts in state.items()}

    def _name(self, factors: FactoredWeight) -> str:
        return self._names[id(factors.W)]

    def _from_host(self, lowrank: Sequence[FactoredWeight]) -> list[tuple[State, State] | None]:
        """The host's state of each W mapped to the factors; None where there is none to map, on this rank or another:
        a host that deals its matrices out has the state of each on one rank only, and B and A stay equal on all."""
        if not lowrank or self._moments == "reset":
            return [None] * len(lowrank)
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        known = [self._used_host_state(self._owned[id(factors.W)], groups) for factors in lowrank]
        on_all = self._everywhere([state is not None for state in known])
        states = [state if held else None for state, held in zip(known, on_all, strict=True)]
        with full_precision(lowrank[0].W.device):
            outcomes = states_to_factors(states, [(factors.B.detach(), factors.A.detach()) for factors in lowrank])
        found: list[tuple[State, State] | None] = []
        for state, outcome in zip(states, outcomes, strict=True):
            if isinstance(outcome, UnknownState):
                log.info("the host keeps its state in a form of its own: %s", outcome)
            found.append(None if state is None or isinstance(outcome, UnknownState) else outcome)
        return found

    def _used_host_state(self, owned: nn.Parameter, groups: Mapping[int, dict[str, Any]]) -> State | None:
        """What the host has for this parameter and the rule for B and A uses; None where it is not all of that. A
        first moment without its second, or without its count of steps, would be divided by nearly nothing."""
        state, group = self._optimizer.state.get(owned), groups.get(id(owned))
        if not state or group is None:
            return None
        _, keys = rule_for(group, self._optimizer)
        wanted = keys if group.get("amsgrad") else keys - {"max_exp_avg_sq"}
        return {key: whole(state[key]) for key in state if key in wanted} if wanted <= state.keys() else None

    def _carry_over(self, changed: Sequence[Refactored]) -> None:
        """From the old factors' own moments."""
        if not changed:
            return
        pairs = [self._state[self._name(one.factors)] for one in changed]
        old = [(one.old_B, one.old_A) for one in changed]
        new = [(one.factors.B.detach(), one.factors.A.detach()) for one in changed]
        with full_precision(changed[0].factors.W.device):
            outcomes = states_between_factors(pairs, old, new)
        for one, outcome in zip(changed, outcomes, strict=True):
            assert not isinstance(outcome, UnknownState), "this state is our own rule's"
            self._state[self._name(one.factors)] = outcome


def _check_rules(optimizer: torch.optim.Optimizer, wanted: Collection[int]) -> None:
    groups = [group for group in optimizer.param_groups if any(id(p) in wanted for p in group["params"])]
    if any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"{type(optimizer).__name__} keeps no learning rate `lr` in its param groups, under which shadow would "
            "step B and A; add one, or use svd_adapter=reregister"
        )
    strange = next((group for group in groups if not has_own_rule(group, optimizer)), None)
    if strange is not None:
        log.warning(
            "%s is none of AdamW, Adam, SGD and Muon: B and A of low-rank matrices are stepped by the rule of %s under "
            "its learning rate, which may fit them badly; svd_match_rms=True gives their updates the size of its own",
            type(optimizer).__name__, "Adam" if "betas" in strange else "SGD",
        )  # fmt: skip


def _own(state: Mapping[str, Any]) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
