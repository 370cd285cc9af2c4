"""What an alarm does while it is up: confine matrices, lower their learning rate, replay first-seen text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svdtrain.adaptive.precision import full_precision
from svdtrain.config import SVDConfig
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.hooks.forgetting import Finding
from svdtrain.trainer.state import ReplayableStream, TrainState

REASON = "alarm"


class Action(Protocol):
    """Begun with the matrices that the alarm names (again when it names more), ended when it is over."""

    name: str

    def begin(self, state: TrainState, names: Sequence[str], finding: Finding) -> None: ...
    def end(self, state: TrainState) -> None: ...
    def resume(self, state: TrainState) -> None:
        """Training starts; after `load_state_dict` where it goes on."""
        ...

    def before_step(self) -> None: ...
    def after_step(self, stepped: bool) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Idle:
    """An action with nothing to do at a step."""

    def resume(self, state: TrainState) -> None:
        """Nothing."""

    def before_step(self) -> None:
        """Nothing."""

    def after_step(self, stepped: bool) -> None:
        """Nothing."""


class Confine(_Idle):
    """lowrank: train the named matrices at a low rank. protect: keep updates out of their first-seen inputs.

    Confined matrices stay so, whatever the policy says, until the alarm is over; then they go back to full training,
    and are analysed at the rank that they had before.
    Matrices that were confined already stay as they are.
    """

    def __init__(self, name: Literal["lowrank", "protect"], svd: AdaptiveSVDHook) -> None:
        self.name = name
        self._mode: Literal["lowrank", "protect"] = name
        self._svd = svd
        self._moved: dict[str, int | None] = {}
        """Their r before."""

    def begin(self, state: TrainState, names: Sequence[str], finding: Finding) -> None:
        controller = self._svd.running
        free = [name for name in names if not controller.targets[name].lowrank]
        if self._mode == "protect":
            free = [name for name in free if name in finding.covariances]
            controller.set_references({name: finding.covariances[name] for name in free})
        for name in free:
            self._moved[name] = controller.targets[name].r
            self._svd.switch(state, name, self._mode, reason=REASON)
        controller.held.update(free)

    def end(self, state: TrainState) -> None:
        controller = self._svd.running
        for name, r in self._moved.items():
            if controller.targets[name].lowrank:
                self._svd.switch(state, name, "full", reason=f"{REASON} over")
            controller.analyse_at(name, r)
        controller.held.difference_update(self._moved)
        self._moved = {}

    def resume(self, state: TrainState) -> None:
        self._svd.running.held.update(self._moved)

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"moved": list(self._moved), "ranks": dict(self._moved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._moved = {name: state.get("ranks", {}).get(name) for name in state["moved"]}


class Replay(_Idle):
    """Fill a share of the batch with first-seen rows, from the next step until the alarm is over. Rows of the probe set
    are never replayed. Acts on the whole model, so a second set of names changes nothing."""

    name = "replay"

    def __init__(self, share: float) -> None:
        self._share = share
        self._up = False
        self._schedule: list[tuple[int, float, int, int]] = []

    def begin(self, state: TrainState, names: Sequence[str], finding: Finding) -> None:
        if not self._up:
            self._up = True
            self._set(state, self._share, finding.num_probe_rows)

    def end(self, state: TrainState) -> None:
        self._up = False
        self._set(state, 0.0, 0)

    def resume(self, state: TrainState) -> None:
        _replayable(state).schedule = [tuple(entry) for entry in self._schedule]  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"up": self._up, "schedule": [list(entry) for entry in self._schedule]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._up, self._schedule = state["up"], [tuple(entry) for entry in state["schedule"]]

    def _set(self, state: TrainState, share: float, keep_out: int) -> None:
        stream = _replayable(state)
        stream.replay(state.step, share, keep_out=keep_out)
        self._schedule = list(stream.schedule)


class LearningRate:
    """Scale the named matrices' learning rate.

    Both Muon and AdamW move a parameter by the learning rate times something that does not depend on it (decoupled
    weight decay included), so W <- W_before + factor (W_after - W_before) is that step at `factor` times the rate, for
    any optimizer of the kind, with its moments untouched. In low-rank mode the same goes for B and A, before W is
    written from them. Costs one copy of the named matrices for the length of a step.
    """

    name = "lr"

    def __init__(self, factor: float, svd: AdaptiveSVDHook) -> None:
        self._factor = factor
        self._svd = svd
        self._names: list[str] = []
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, state: TrainState, names: Sequence[str], finding: Finding) -> None:
        self._names += [name for name in names if name not in self._names]

    def end(self, state: TrainState) -> None:
        self._names = []

    def resume(self, state: TrainState) -> None:
        """Nothing."""

    def before_step(self) -> None:
        """Keep what the optimizer is about to move."""
        self._before = [(p, p.detach().clone()) for name in self._names for p in self._trained(name)]

    def after_step(self, stepped: bool) -> None:
        """Take back the share of the step that is too much."""
        for p, before in self._before if stepped else ():
            with full_precision(p.device):
                p.copy_(torch.lerp(before, p, self._factor))
        self._before = []

    def _trained(self, name: str) -> tuple[nn.Parameter, ...]:
        target = self._svd.running.targets[name]
        return (target.W,) if target.factors is None else (target.factors.B, target.factors.A)

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._names = list(state["names"])


def build_actions(config: SVDConfig, svd: AdaptiveSVDHook) -> list[Action]:
    """The actions that the settings name, in their order. `svd_switching=False` means that nothing is confined."""
    makers: dict[str, Any] = {
        "lowrank": lambda: Confine("lowrank", svd),
        "protect": lambda: Confine("protect", svd),
        "replay": lambda: Replay(config.svd_replay_share),
        "lr": lambda: LearningRate(config.svd_alarm_lr, svd),
    }
    wanted = [name for name in config.alarm_actions if config.svd_switching or name not in ("lowrank", "protect")]
    return [makers[name]() for name in wanted]


def _replayable(state: TrainState) -> ReplayableStream:
    stream: Any = state.stream
    assert hasattr(stream, "schedule"), "build_trainer wraps its stream in a ReplayStream"
    return stream
