"""What training does to the text it saw first: loss on a frozen probe set, and interference, matrix by matrix."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.alarm import Evidence
from svdtrain.adaptive.interference import Interference, Reading, bootstrap_interval
from svdtrain.adaptive.precision import full_precision
from svdtrain.adaptive.targets import select_targets
from svdtrain.config import SVDConfig
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.hooks.reference import ControlRows, FirstSeen, linear_layers
from svdtrain.spectral.null import functional_drift
from svdtrain.trainer.distributed import sum_over_ranks
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import ReplayableStream, TrainState

logger = logging.getLogger(__name__)

_CONTROL_EVERY = 5  # measurements; the control set moves slowly and decides nothing


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measurement of forgetting."""

    step: int
    evidence: Evidence
    reading: Reading
    covariances: dict[str, Tensor] = field(repr=False)
    """E[x x^T] [n, n] of each matrix' inputs on the probe rows."""
    num_probe_rows: int


class ForgettingHook(Hook):
    """Measures every `svd_interference_every` steps, and whenever `measure` is called; publishes `forgetting` records.

    Training is left as it was, to the last bit. A measurement falls on the step before a multiple of the interval, so
    that the analysis at the multiple has fresh interference. Registered before the adaptive-SVD hook.
    """

    name = "forgetting"
    priority = Priority.OBSERVE

    def __init__(self, config: SVDConfig, svd: AdaptiveSVDHook, control_rows: ControlRows) -> None:
        """`svd` is told the interference of each measurement and, where it protects inputs, their covariances."""
        self.config = config
        self.svd = svd
        self.newest: Finding | None = None
        self.seconds = 0.0
        self._control_rows = control_rows
        self._best: Tensor | None = None
        self._last: Tensor | None = None
        self._num_measurements = 0
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, state: TrainState) -> None:
        stream: ReplayableStream = state.stream  # type: ignore[assignment]
        self.targets = select_targets(state.model, self.config.svd_targets)
        self.first_seen = FirstSeen(state, self.config, stream, self._control_rows)
        self._seen_after = math.ceil(self.first_seen.counts.probe / stream.batch_size)
        self._layers: dict[str, nn.Module] = linear_layers(state.model, self.targets)
        counts, world = self.first_seen.counts, state.world
        self._rows = {"probe": counts.probe, "reference": counts.reference, "ranks": world.size}
        """What was measured belongs to these, and the last gradient to this rank's share of the reference rows."""
        self.interference = Interference(
            self.targets,
            self.first_seen.reference_losses(),
            average=lambda values: sum_over_ranks(values, world) / world.size,
        )
        if self._saved is not None:
            self._go_on(self._saved)
            self._saved = None

    def on_step_start(self, state: TrainState) -> None:
        self._begin_window()

    def on_step_end(self, state: TrainState) -> None:
        if (state.step + 1) % self.config.svd_interference_every == 0 and not state.control.skip_step:
            self.measure(state)

    def measure(self, state: TrainState) -> Finding:
        """Measure now, at the end of a step; what was found stays in `newest` until the next step starts."""
        started = time.perf_counter()
        reading = self.interference.measure()
        probe, covariances = self.first_seen.probe_losses(self._layers)
        with_control = self._num_measurements % _CONTROL_EVERY == 0
        control_loss = float(self.first_seen.control_losses().mean()) if with_control else math.nan
        self._num_measurements += 1
        evidence = self._judge(state.step, probe, reading)
        self.newest = Finding(
            step=state.step,
            evidence=evidence,
            reading=reading,
            covariances=covariances,
            num_probe_rows=self.first_seen.counts.probe,
        )
        numbers = {**reading.metrics(), **self._losses(probe, control_loss, evidence), **self._drift(covariances)}
        self._inform(reading, covariances)
        self.seconds = time.perf_counter() - started
        state.log("forgetting", {**numbers, "forgetting/seconds": round(self.seconds, 4)})
        return self.newest

    def rebase(self) -> None:
        """Count harm from the loss as it is now: an alarm is over, and what is lost is lost."""
        self._best = self._last

    def state_dict(self) -> dict[str, Any]:
        self._begin_window()  # a checkpoint lies between two steps
        return {
            "rows": dict(self._rows),
            "interference": self.interference.state_dict(),
            "best": self._best,
            "last": self._last,
            "num_measurements": self._num_measurements,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    def _go_on(self, saved: dict[str, Any]) -> None:
        """From what was measured before, as far as it was measured with the same rows."""
        was, now = saved.get("rows", self._rows), self._rows
        self._num_measurements = saved["num_measurements"]
        if was["probe"] == now["probe"]:
            self._best, self._last = saved["best"], saved["last"]
        else:
            said = "%d probe rows were followed before, now %d: harm is counted from here on"
            logger.warning(said, was["probe"], now["probe"])
        if was == now:
            self.interference.load_state_dict(saved["interference"])

    def _begin_window(self) -> None:
        if self.newest is not None:
            self.interference.advance()
            self.newest = None

    def _judge(self, step: int, probe: Tensor, reading: Reading) -> Evidence:
        """Harm against the lowest loss that the probe had, row by row; from when all of it has been trained on."""
        rise = math.nan if self._last is None else float((probe - self._last).mean())
        if self._best is None or step <= self._seen_after or probe.mean() < self._best.mean():
            self._best = probe
        self._last = probe
        low, _ = bootstrap_interval(probe - self._best)
        harm = float((probe - self._best).mean())
        return Evidence(step=step, harm=harm, harm_low=float(low), rise=rise, interference=reading.nats)

    def _losses(self, probe: Tensor, control_loss: float, evidence: Evidence) -> dict[str, float]:
        loss = float(probe.mean())
        numbers = {
            "probe/loss": loss,
            "probe/rise": evidence.rise,
            "probe/harm": evidence.harm,
            "probe/harm_low": evidence.harm_low,
            "control/loss": control_loss,
            "probe/minus_control": loss - control_loss,
        }
        return {key: value for key, value in numbers.items() if not math.isnan(value)}

    def _drift(self, covariances: dict[str, Tensor]) -> dict[str, float]:
        """Functional drift since the last measurement, its chance level and the ratio, by matrix; read back at once."""
        columns = {}
        for name, C in covariances.items():
            dW = self.interference.update(name)
            if dW is None:
                return {}
            with full_precision(dW.device):
                drift = functional_drift(dW, self.targets[name].detach(), C)
            columns[name] = torch.stack([drift.value, drift.chance, drift.lift])
        if not columns:
            return {}
        values = torch.stack(list(columns.values())).tolist()
        keys = ("functional_drift", "functional_drift_chance", "functional_drift_lift")
        return {
            f"drift/{name}/{key}": value
            for name, row in zip(columns, values, strict=True)
            for key, value in zip(keys, row, strict=True)
        }

    def _inform(self, reading: Reading, covariances: dict[str, Tensor]) -> None:
        """Tell the controller; a matrix that is guarded keeps the inputs that it was guarded with."""
        controller = self.svd.running
        if not math.isnan(reading.total):
            controller.note_interference(reading.nats)
        if self.config.svd_protect == "activation":
            controller.set_references({n: C for n, C in covariances.items() if controller.targets[n].guard is None})
