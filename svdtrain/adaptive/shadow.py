"""`Shadow`: the host optimizer keeps W, steps it and never learns of B and A."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.moments import UnknownState, state_from_factors, state_to_factors
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.registration import Moments, check_ownership
from svdtrain.adaptive.sharded import whole
from svdtrain.adaptive.update_rules import State, rule_for

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
        everywhere: Callable[[bool], bool] = bool,
    ) -> None:
        """`owned`: what the optimizer has in the place of each target, where that is not the target itself (shards).
        `everywhere`: whether something holds on every rank; every rank asks at the same changes.
        Raises ValueError when a target is not in the optimizer."""
        check_ownership(optimizer, owned or targets)
        self._owned = {id(W): (owned or targets)[name] for name, W in targets.items()}
        self._optimizer = optimizer
        self._moments: Moments = moments
        self._everywhere = everywhere
        self._names = {id(W): name for name, W in targets.items()}
        self._lowrank: dict[str, FactoredWeight] = {}
        self._state: dict[str, tuple[State, State]] = {}

    def adopt(self, factors: FactoredWeight) -> None:
        """Start from the host's moments of W, where it keeps them per parameter; else from none."""
        name = self._names[id(factors.W)]
        self._lowrank[name] = factors
        self._state[name] = self._from_host(factors) or ({}, {})

    def refactored(self, factors: FactoredWeight, old_B: Tensor, old_A: Tensor) -> None:
        """Map the host's moments of W, which have seen every gradient, onto the new factors; where the host keeps them
        in a form of its own, carry the old factors' moments over through their least-squares moment of W."""
        name = self._names[id(factors.W)]
        state = self._from_host(factors)
        if state is None and self._moments == "map" and all(self._state[name]):
            with full_precision(factors.W.device):
                whole = state_from_factors(*self._state[name], old_B, old_A)
                state = state_to_factors(whole, factors.B.detach(), factors.A.detach())
        self._state[name] = state or ({}, {})

    def release(self, factors: FactoredWeight) -> None:
        """The host goes on with W and the moments that it has kept."""
        name = self._names[id(factors.W)]
        del self._lowrank[name], self._state[name]

    def restore(self, lowrank: list[FactoredWeight]) -> None:
        """These matrices are low-rank; their state comes with `load_state_dict`."""
        self._lowrank = {self._names[id(factors.W)]: factors for factors in lowrank}
        self._state = {name: ({}, {}) for name in self._lowrank}

    def before_step(self) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Step B and A where there is a gradient."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for name, factors in self._lowrank.items():
            group = groups[id(self._owned[id(factors.W)])]
            step, _ = rule_for(group, self._optimizer)
            for p, state in zip((factors.B, factors.A), self._state[name], strict=True):
                if p.grad is not None:
                    step(p, state, group)

    def full_update_norm(self, factors: FactoredWeight, W_before: Tensor) -> Tensor:
        """||dW||_F of the step that the host has just taken with W."""
        return torch.linalg.vector_norm(factors.W - W_before)

    def state_dict(self) -> dict[str, Any]:
        """The moments of B and A by matrix."""
        return {name: {"B": dict(B), "A": dict(A)} for name, (B, A) in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError when it does not belong to these low-rank matrices."""
        if set(state) != set(self._lowrank):
            raise ValueError("no moments of B and A in this state: it was saved with another svd_adapter; use that one")
        self._state = {name: (_own(parts["B"]), _own(parts["A"])) for name, parts in state.items()}

    def _from_host(self, factors: FactoredWeight) -> tuple[State, State] | None:
        """The host's state of W mapped to the factors; None where there is none to map, on this rank or on another: a
        host that deals its matrices out has the state of each on one rank only, and B and A must stay equal on all."""
        mapped = self._mapped(factors)
        return mapped if self._everywhere(mapped is not None) else None

    def _mapped(self, factors: FactoredWeight) -> tuple[State, State] | None:
        owned = self._owned[id(factors.W)]
        host_state = self._optimizer.state.get(owned) if self._moments == "map" else None
        if not host_state:
            return None
        group = next(g for g in self._optimizer.param_groups if any(p is owned for p in g["params"]))
        _, keys = rule_for(group, self._optimizer)
        used = {key: whole(value) for key, value in host_state.items() if key in keys}
        try:
            with full_precision(factors.W.device):
                return state_to_factors(used, factors.B.detach(), factors.A.detach())
        except UnknownState as error:
            log.info("the host keeps its state in a form of its own: %s", error)
            return None


def _own(state: Mapping[str, Any]) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
