"""Adaptive SVD as one hook among others: the trainer itself knows nothing of it."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist

from svdtrain.adaptive.controller import AdaptiveSVD, Change
from svdtrain.config import SVDConfig
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import ParamsChange, TrainState


class AdaptiveSVDHook(Hook):
    """Runs the controller at the right moments of the step and publishes what it saw and did."""

    name = "adaptive_svd"
    priority = Priority.OBSERVE

    def __init__(self, config: SVDConfig) -> None:
        self.config = config
        self.controller: AdaptiveSVD | None = None
        self._saved: dict[str, Any] | None = None

    def on_restore(self, state: TrainState) -> None:
        """The optimizer exists and holds no moments yet: its layout can be brought back before they are loaded."""
        group = dist.group.WORLD if state.world.size > 1 else None
        self.controller = AdaptiveSVD(state.model, state.optimizer, self.config, group=group)
        if self._saved is not None:
            self.controller.load_state_dict(self._saved)
        self._publish_substitutes(state)

    def on_step_start(self, state: TrainState) -> None:
        self.running.keep_foreign_writes()  # a hook may have changed weights after the last step

    def on_backward_end(self, state: TrainState) -> None:
        if self.running.optimizer_has_factors:  # which clips their gradients
            self.running.project_gradients()

    def on_before_optimizer_step(self, state: TrainState) -> None:
        if not self.running.optimizer_has_factors:  # from the gradient of W as it was clipped
            self.running.project_gradients()

    def on_optimizer_step_end(self, state: TrainState, stepped: bool) -> None:
        changes = self.running.after_step(state.step, stepped)
        self._publish_substitutes(state)
        for change in changes:
            state.params_changed(_public(change))
        for event in self.running.events():
            state.alert(event["level"], "svd", f"{event['name']}: {event['message']}")
        if stepped:
            self._log(state)

    def _log(self, state: TrainState) -> None:
        """Every step the few numbers over all matrices, at a decision everything of every matrix."""
        seen = self.running.step_metrics()
        if seen:
            state.log("svd_step", {key: _short(value) for key, value in seen.items()})
        if state.step % self.config.svd_interval == 0:
            state.log("svd", {key: _short(value) for key, value in self.running.metrics().items()})

    def switch(self, state: TrainState, name: str, mode: Literal["lowrank", "protect", "full"], *, reason: str) -> None:
        """Put one matrix into a mode by hand, between steps, and announce it. lowrank: at `svd_alarm_rank`, as
        far as `svd_min_rank` and the matrix allow."""
        target = self.running.targets[name]
        before = target.num_free_directions
        if mode == "protect":
            self.running.protect_inputs(name)
        else:
            g = min(target.W.shape)
            r = min(max(round(self.config.svd_alarm_rank * g), self.config.svd_min_rank), g - 1)
            self.running.set_mode(name, r if mode == "lowrank" else None)
        self._publish_substitutes(state)
        kind = "to_full" if mode == "full" else "to_lowrank"
        after = target.num_free_directions
        state.params_changed(ParamsChange(name=name, kind=kind, r_old=before, r_new=after, reason=reason))

    def state_dict(self) -> dict[str, Any]:
        return self.running.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    @property
    def running(self) -> AdaptiveSVD:
        """The controller; there from `on_restore` on."""
        assert self.controller is not None, "on_restore was not called"
        return self.controller

    def _publish_substitutes(self, state: TrainState) -> None:
        """Tell the trainer which parameters the optimizer trains in place of the model's own, if any."""
        targets = self.running.targets.values()
        state.num_lowrank = sum(target.lowrank for target in targets)
        names = {id(p): name for name, p in state.model.named_parameters()}
        state.substitutes = {
            names[id(target.W)]: (target.factors.B, target.factors.A)
            for target in targets
            if target.factors is not None and self.running.optimizer_has_factors
        }


def _short(value: float | str) -> float | str:
    """Six significant digits: more says nothing and doubles the size of the log."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _public(change: Change) -> ParamsChange:
    return ParamsChange(
        name=change.name,
        kind=change.kind,
        r_old=change.r_old,
        r_new=change.r_new,
        reason=change.reason,
        diagnostics=change.diagnostics,
    )
