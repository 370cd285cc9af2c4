"""The CORE score in the loop."""

from __future__ import annotations

import time

from svdtrain.evaluation import CoreBundle, evaluate_core
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState


class CoreMetric(Hook):
    """Publishes `core_metric` and `core/<task>` every `every` steps (0: never) and after the last step.

    Every rank takes its share of the examples. The uncompiled model is used, because prompts differ in length.
    """

    name = "core_metric"
    priority = Priority.OBSERVE

    def __init__(self, bundle: CoreBundle, *, every: int = 0) -> None:
        self.bundle = bundle
        self.every = every

    def on_step_end(self, state: TrainState) -> None:
        if self.every and state.step % self.every == 0 and state.step < state.num_iterations:
            self._evaluate(state)

    def on_stop(self, state: TrainState) -> None:
        if state.step == state.num_iterations:  # a run that is asked to stop early has no minutes to spare
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        started = time.perf_counter()
        state.model.eval()
        result = evaluate_core(state.model, state.tokenizer, self.bundle, device=state.device)
        state.model.train()
        state.log("eval", {**result.metrics(), "core_seconds": time.perf_counter() - started})
