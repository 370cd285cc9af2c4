"""The training record of every step: loss, throughput, schedule."""

from __future__ import annotations

import time
from typing import Any

from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState

LOSS_EMA_DECAY = 0.9


class TrainLog(Hook):
    """Publishes a `train` record every `log_every` steps, under nanochat's metric names.

    Args:
        flops_per_token: forward and backward; 0 leaves out MFU.
        peak_flops: of all devices together; 0 leaves out MFU.
    """

    name = "train_log"
    priority = Priority.OBSERVE

    def __init__(self, *, flops_per_token: float = 0.0, peak_flops: float = 0.0) -> None:
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.ema = 0.0
        self.num_steps = 0
        self._started = 0.0

    def on_step_start(self, state: TrainState) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, state: TrainState) -> None:
        if state.control.skip_step:
            return  # an untaken step has no loss worth averaging; the alert tells of it
        loss = state.metrics["train/loss"]
        self.ema = LOSS_EMA_DECAY * self.ema + (1 - LOSS_EMA_DECAY) * loss
        self.num_steps += 1
        if state.step % state.config.train.log_every == 0 or state.step == state.num_iterations:
            state.log("train", self._fields(state, loss))

    def _fields(self, state: TrainState, loss: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        tokens_per_second = state.config.train.total_batch_size / seconds
        fields = {
            "train/loss": loss,
            "train/loss_ema": self.ema / (1 - LOSS_EMA_DECAY**self.num_steps),
            "train/grad_norm": state.metrics["train/grad_norm"],
            "train/lrm": state.optimizer.param_groups[0]["lr"] / state.optimizer.param_groups[0]["initial_lr"],
            "train/dt": seconds,
            "train/tok_per_sec": tokens_per_second,
            "train/tokens": float(state.step * state.config.train.total_batch_size),
        }
        if self.flops_per_token and self.peak_flops:
            fields["train/mfu"] = 100 * self.flops_per_token * tokens_per_second / self.peak_flops
        return fields

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema, self.num_steps = state["ema"], state["num_steps"]
