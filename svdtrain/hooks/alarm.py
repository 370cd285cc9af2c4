"""The alarm in the training loop: watches cheap statistics, has harm measured, says what it found, and acts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdtrain.adaptive.alarm import Alarm, Triggers
from svdtrain.config import SVDConfig
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.hooks.alarm_actions import Action, build_actions
from svdtrain.hooks.forgetting import Finding, ForgettingHook
from svdtrain.runlog import Record
from svdtrain.spectral.activations import input_basis
from svdtrain.spectral.decompose import DecompositionFailed, decompose
from svdtrain.trainer.distributed import sum_over_ranks
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState

_PRINCIPAL_SHARE = 0.25  # of the directions that a record calls principal, on either side
_MOST_SPLIT = 16  # matrices in a record whose directions are computed, each by two exact decompositions
_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")  # Muon and SGD; Adam


class AlarmHook(Hook):
    """Raises, keeps and clears the alarm; publishes `trigger` records (each logged step) and `alarm` records.

    A trigger asks for a measurement at once, at most every quarter of `svd_interference_every` steps. Registered after
    the forgetting hook and before the adaptive-SVD hook, so that `lr` scales an update before W is written from it.
    """

    name = "alarm"
    priority = Priority.OBSERVE

    def __init__(self, config: SVDConfig, forgetting: ForgettingHook, svd: AdaptiveSVDHook) -> None:
        self.config = config
        self.alarm = Alarm(nats=config.svd_alarm_nats, patience=config.svd_alarm_patience)
        self.triggers = Triggers(config.svd_alarm_z, two_sided=("turn",))
        self.actions: list[Action] = build_actions(config, svd)
        self.forgetting = forgetting
        self._trigger = ""
        self._measured_at = 0
        self._turn: Tensor | None = None
        self._statistics: dict[str, float] = {}

    def on_train_start(self, state: TrainState) -> None:
        for action in self.actions:
            action.resume(state)

    def on_step_start(self, state: TrainState) -> None:
        self._statistics = {}

    def on_backward_end(self, state: TrainState) -> None:
        self._turn = self._turn_of_gradient(state)

    def on_before_optimizer_step(self, state: TrainState) -> None:
        """The guard has just waited for the device, so reading one number more costs nothing."""
        loss = torch.tensor([state.metrics["train/loss"]], dtype=torch.float64)
        self._statistics["loss"] = float(sum_over_ranks(loss, state.world)) / state.world.size
        self._statistics["grad_norm"] = state.metrics["train/grad_norm"]
        if self._turn is not None:
            self._statistics["turn"] = float(self._turn)
        for action in self.actions:
            action.before_step()

    def on_optimizer_step_end(self, state: TrainState, stepped: bool) -> None:
        for action in self.actions:
            action.after_step(stepped)

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        lifts = [v for key, v in fields.items() if key.endswith("/update_lift")] if kind == "svd" else []
        if lifts:
            self._statistics["lift"] = sum(lifts) / len(lifts)

    def on_step_end(self, state: TrainState) -> None:
        if state.control.skip_step:
            return
        z = self.triggers.update(self._statistics)
        self._publish_trigger(state, z)
        finding = self.forgetting.newest
        if finding is None and self._wants_measurement(state, self.triggers.fired(z)):
            finding = self.forgetting.measure(state)
        if finding is not None:
            self._measured_at = state.step
            self._consider(state, finding)
            self._trigger = ""

    def state_dict(self) -> dict[str, Any]:
        return {
            "alarm": self.alarm.state_dict(),
            "triggers": self.triggers.state_dict(),
            "actions": {action.name: action.state_dict() for action in self.actions},
            "trigger": self._trigger,
            "measured_at": self._measured_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if all(action.name in state["actions"] for action in self.actions):
            self.alarm.load_state_dict(state["alarm"])  # else svd_on_alarm has changed: it starts anew
        self.triggers.load_state_dict(state["triggers"])
        self._trigger, self._measured_at = state["trigger"], state["measured_at"]
        for action in self.actions:
            if action.name in state["actions"]:
                action.load_state_dict(state["actions"][action.name])

    def _turn_of_gradient(self, state: TrainState) -> Tensor | None:
        """1 - cosine between the gradients of the watched matrices and their momentum before this step; on the device.
        None where the optimizer keeps none for any of them."""
        pairs = []
        for W in self.forgetting.targets.values():
            kept = state.optimizer.state.get(W, {})
            momentum = next((kept[key] for key in _MOMENTUM_KEYS if key in kept), None)
            if momentum is not None and W.grad is not None:
                pairs.append((W.grad, momentum))
        if not pairs:
            return None
        sums = torch.stack([torch.stack([(G * M).sum(), G.square().sum(), M.square().sum()]) for G, M in pairs]).sum(0)
        return 1 - sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(torch.finfo(sums.dtype).tiny)

    def _publish_trigger(self, state: TrainState, z: dict[str, float]) -> None:
        if state.step % state.config.train.log_every == 0:
            fields = {f"trigger/{name}_z": value for name, value in z.items() if value == value}
            if "turn" in self._statistics:
                fields["trigger/turn"] = self._statistics["turn"]
            state.log("trigger", {**fields, "alarm/up": float(self.alarm.up)})

    def _wants_measurement(self, state: TrainState, fired: str) -> bool:
        """Remembers what fired until it can be looked into."""
        self._trigger = self._trigger or fired
        gap = max(1, self.config.svd_interference_every // 4)
        return bool(self._trigger) and state.step - self._measured_at >= gap

    def _consider(self, state: TrainState, finding: Finding) -> None:
        before = self.alarm.named
        transition = self.alarm.consider(finding.evidence)
        if transition == "quiet":
            return
        added = [name for name in self.alarm.named if name not in before]
        if transition == "cleared":
            self.forgetting.rebase()
            for action in self.actions:
                action.end(state)
        elif added or transition == "raised":
            for action in self.actions:
                action.begin(state, added, finding)
        self._report(state, transition, added, finding)

    def _report(self, state: TrainState, transition: str, added: list[str], finding: Finding) -> None:
        evidence = finding.evidence
        fields: Record = {
            "transition": transition,
            "trigger": self._trigger or "interval",
            "since": self.alarm.since,
            "actions": [action.name for action in self.actions],
            "matrices": [self._describe(name, finding, split=i < _MOST_SPLIT) for i, name in enumerate(added)],
            "alarm/harm": evidence.harm,
            "alarm/interference": evidence.total,
            "alarm/up": float(self.alarm.up),
        }
        state.log("alarm", fields)
        if transition == "raised":
            state.alert("WARNING", "interference", _sentence(fields))
        elif transition == "cleared":
            message = f"no more loss of first-seen text ({evidence.harm:.3f} nats stay lost)"
            state.alert("INFO", "interference", f"the alarm of step {self.alarm.since} is over: {message}")

    def _describe(self, name: str, finding: Finding, *, split: bool) -> dict[str, Any]:
        """Nats of one matrix, and through which directions: W's principal left ones, the inputs' principal ones."""
        if not split:
            return {"name": name, "nats": finding.reading.nats[name]}
        W, C = self.forgetting.targets[name], finding.covariances.get(name)
        left = inputs = None
        try:
            left = decompose(W.detach()).U[:, : max(1, round(_PRINCIPAL_SHARE * min(W.shape)))]
            inputs = None if C is None else input_basis(C).top(max(1, round(_PRINCIPAL_SHARE * W.shape[1])))
        except DecompositionFailed:
            pass  # the nats stand without directions; the controller warns of a matrix that cannot be decomposed
        return {"name": name, "nats": finding.reading.nats[name], **self.forgetting.interference.split(
            name, left=left, inputs=inputs
        )}  # fmt: skip


def _sentence(fields: Record) -> str:
    worst = ", ".join(f"{matrix['name']} ({matrix['nats']:+.4f})" for matrix in fields["matrices"][:3])
    worst = worst or "no watched matrix"
    more = f" and {len(fields['matrices']) - 3} more" if len(fields["matrices"]) > 3 else ""
    acts = ", ".join(fields["actions"]) or "none"
    return (
        f"first-seen text has lost {fields['alarm/harm']:.3f} nats a token (found by {fields['trigger']}); "
        f"interference {fields['alarm/interference']:+.4f} nats, most by {worst}{more}; action: {acts}"
    )
