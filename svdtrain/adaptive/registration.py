"""Who owns B and A. `Reregister` puts them into the host optimizer in W's place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.moments import UnknownState, state_from_factors, state_to_factors
from svdtrain.adaptive.precision import full_precision

log = logging.getLogger(__name__)

Moments = Literal["map", "reset"]
FACTORS_OF = "svd_factors_of"
"""Key that marks a param group of factors; its value is the index of the group whose matrices they replace. A key in
the group, because `optimizer.load_state_dict` replaces every group dict by a new one."""


class Adapter(Protocol):
    """How B and A are stepped. W and its state outside low-rank mode are always the host optimizer's."""

    def adopt(self, factors: FactoredWeight) -> None:
        """W enters low-rank mode: B and A are trained from now on."""
        ...

    def refactored(self, factors: FactoredWeight, old_B: Tensor, old_A: Tensor) -> None:
        """B and A were recomputed (old values given): carry their moments over."""
        ...

    def release(self, factors: FactoredWeight) -> None:
        """W goes back to full mode."""
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

    def state_dict(self) -> dict[str, Any]:
        """State that the host optimizer's own state_dict does not hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, after `restore`."""
        ...


class Reregister:
    """Takes W out of its param group and puts B and A into a sibling group with the same hyperparameters.

    Sibling groups follow the host's groups, one per group that has low-rank matrices, each ordered as the host group
    was: the layout depends on which matrices are low-rank, never on the order in which they switched. W returns to its
    original place. State of every other parameter is never touched.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter], moments: Moments) -> None:
        """Raises ValueError when a target is not in the optimizer."""
        check_ownership(optimizer, targets)
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

    def adopt(self, factors: FactoredWeight) -> None:
        """W leaves the optimizer with its state; B and A join with the mapped state (or none after `reset`)."""
        state = self._optimizer.state.pop(factors.W, None)
        self._give_state(factors, state or None)
        self._lowrank[id(factors.W)] = factors
        self._lay_out()

    def refactored(self, factors: FactoredWeight, old_B: Tensor, old_A: Tensor) -> None:
        """Carry the moments from the old factors to the new ones, through their least-squares moment of W."""
        self._give_state(factors, self._take_state(factors, old_B, old_A))

    def release(self, factors: FactoredWeight) -> None:
        """B and A leave; W returns to its original place with moments by least squares (or none after `reset`)."""
        state = self._take_state(factors, factors.B.detach(), factors.A.detach())
        del self._lowrank[id(factors.W)]
        self._lay_out()
        if state:
            self._optimizer.state[factors.W] = state

    def restore(self, lowrank: list[FactoredWeight]) -> None:
        """The layout for these low-rank matrices; `optimizer.load_state_dict` fits exactly afterwards."""
        for factors in self._lowrank.values():
            self._optimizer.state.pop(factors.B, None)
            self._optimizer.state.pop(factors.A, None)
        for factors in lowrank:
            self._optimizer.state.pop(factors.W, None)
        self._lowrank = {id(factors.W): factors for factors in lowrank}
        self._lay_out()

    def before_step(self) -> None:
        """Copy hyperparameters to the sibling groups: a schedule may know only the host's groups."""
        hosts, siblings = self._groups()
        for index, sibling in siblings.items():
            _copy_hyperparameters(hosts[index], sibling)

    def after_step(self) -> None:
        """Nothing to do: the host optimizer stepped B and A."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: everything is in the host optimizer's state_dict."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _groups(self) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        """The host's groups, and the sibling groups by the index of their host group."""
        groups = self._optimizer.param_groups
        hosts = [group for group in groups if FACTORS_OF not in group]
        return hosts, {group[FACTORS_OF]: group for group in groups if FACTORS_OF in group}

    def _lay_out(self) -> None:
        """Rebuild every param list from which matrices are low-rank."""
        hosts, siblings = self._groups()
        expected = _ids(self._optimizer) - {id(t) for group in siblings.values() for t in group["params"]}
        factor_groups = []
        for index, original in self._original.items():
            original += [p for p in hosts[index]["params"] if all(p is not known for known in original)]
            expected |= {id(p) for p in original}
            lowrank = [self._lowrank[id(p)] for p in original if id(p) in self._lowrank]
            _set_params(hosts[index], [p for p in original if id(p) not in self._lowrank], self._names)
            if lowrank:
                sibling = siblings.get(index, {FACTORS_OF: index})
                _copy_hyperparameters(hosts[index], sibling)
                _set_params(sibling, [t for factors in lowrank for t in (factors.B, factors.A)], self._factor_names())
                factor_groups.append(sibling)
        self._optimizer.param_groups[:] = hosts + factor_groups
        for factors in self._lowrank.values():
            expected = expected - {id(factors.W)} | {id(factors.B), id(factors.A)}
        owned = [id(p) for group in self._optimizer.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)), "a parameter is in the optimizer twice"
        assert set(owned) == expected, "the optimizer's parameters are not exactly the trainable ones"

    def _factor_names(self) -> dict[int, str]:
        names = {}
        for key, factors in self._lowrank.items():
            if key in self._names:
                names[id(factors.B)], names[id(factors.A)] = f"{self._names[key]}.B", f"{self._names[key]}.A"
        return names

    def _give_state(self, factors: FactoredWeight, state: dict[str, Any] | None) -> None:
        if self._moments == "reset" or not state:
            return
        try:
            with full_precision(factors.W.device):
                state_B, state_A = state_to_factors(state, factors.B.detach(), factors.A.detach())
        except UnknownState as error:
            log.warning("the optimizer state of one matrix restarts from zero: %s", error)
            return
        self._optimizer.state[factors.B], self._optimizer.state[factors.A] = state_B, state_A

    def _take_state(self, factors: FactoredWeight, B: Tensor, A: Tensor) -> dict[str, Any] | None:
        """Remove the state of B and A and return what it means for W; B and A are the values it belongs to."""
        state_B = self._optimizer.state.pop(factors.B, None)
        state_A = self._optimizer.state.pop(factors.A, None)
        if self._moments == "reset" or not state_B or not state_A:
            return None
        with full_precision(factors.W.device):
            return state_from_factors(state_B, state_A, B, A)


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


def _copy_hyperparameters(source: dict[str, Any], destination: dict[str, Any]) -> None:
    destination.update({key: value for key, value in source.items() if key not in ("params", "param_names")})


def _parameter_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names that an optimizer built from `named_parameters()` keeps beside its parameters."""
    return {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def _set_params(group: dict[str, Any], params: list[nn.Parameter], names: Mapping[int, str]) -> None:
    group["params"] = params
    if names:
        group["param_names"] = [names[id(p)] for p in params if id(p) in names]
