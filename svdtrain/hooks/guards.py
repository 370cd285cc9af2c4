"""Guards: a step whose loss or gradients are not finite is never taken, and three in a row end the run."""

from __future__ import annotations

from typing import Any

import torch

from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState

MAX_BAD_STEPS = 3


class NonFiniteGuard(Hook):
    """Vetoes a step with a non-finite loss or gradient, raises a CRITICAL alert, and stops after three in a row.

    This is the loop's one synchronisation with the device: the loss is read here, and everybody who logs it uses
    `state.metrics["train/loss"]`.
    """

    name = "non_finite_guard"
    priority = Priority.CONTROL

    def __init__(self) -> None:
        self.bad_in_a_row = 0

    def on_before_optimizer_step(self, state: TrainState) -> None:
        assert state.loss is not None
        loss = state.loss.double()
        gradients = [p.grad for p in state.trainable_parameters().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).double()
        loss_value, norm_value = torch.stack([loss, norm.to(loss.device)]).tolist()
        state.metrics["train/loss"], state.metrics["train/grad_norm"] = loss_value, norm_value
        problem = _not_finite(loss_value, "loss") or _not_finite(norm_value, "gradient norm")
        if not problem:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        state.control.request_skip_step(problem)
        state.alert("CRITICAL", "non_finite", f"step {state.step + 1}: {problem}; the step is not taken")

    def on_step_end(self, state: TrainState) -> None:
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            state.control.request_stop(f"non-finite for {MAX_BAD_STEPS} steps in a row")

    def state_dict(self) -> dict[str, Any]:
        return {"bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_in_a_row = state["bad_in_a_row"]


def _not_finite(value: float, what: str) -> str:
    return "" if value - value == 0 else f"{what} is {value}"
