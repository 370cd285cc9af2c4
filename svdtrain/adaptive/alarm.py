"""The alarm: cheap triggers at every step, confirmed by measured harm to first-seen data, with hysteresis. No tensors.

A trigger only asks for a measurement at once. The alarm goes up on evidence: the loss on first-seen text has risen by
more than can be noise. Interference names the watched matrices that made it rise. It goes down after several calm
measurements in a row. No share of a spectrum announces harm better than loss and gradient norm do (docs/METHOD.md), so
the shares (`lift`) are one trigger among others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BLAMED_SHARE = 0.8  # matrices are named until they hold this share of all harm

Transition = Literal["raised", "kept", "cleared", "quiet"]


@dataclass(kw_only=True)
class RunningScale:
    """Exponentially weighted mean and variance of one statistic, and how far a new value lies above them.

    Values count at most three standard deviations towards the baseline: an outlier cannot hide the next one, and a
    lasting change becomes the new normal in time.
    """

    decay: float = 0.98
    warmup: int = 20
    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def update(self, value: float) -> float:
        """z of `value` against what came before, nan while fewer than `warmup` values did; then take it in."""
        if not math.isfinite(value):
            return math.nan
        z = self._z(value)
        deviation = math.sqrt(self.variance)
        ready = self.count >= self.warmup and deviation > 0
        kept = min(max(value, self.mean - 3 * deviation), self.mean + 3 * deviation) if ready else value
        self.count += 1
        weight = max(1 - self.decay, 1 / self.count)  # a plain average first
        off = kept - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)
        return z

    def _z(self, value: float) -> float:
        if self.count < self.warmup:
            return math.nan
        return (value - self.mean) / max(math.sqrt(self.variance), 1e-6 * abs(self.mean), 1e-12)


class Triggers:
    """One RunningScale per statistic; a statistic fires when its z passes the threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._scales: dict[str, RunningScale] = {}

    def update(self, values: Mapping[str, float]) -> dict[str, float]:
        """z of each statistic, nan where it is not known yet. Statistics may come and go."""
        return {name: self._scales.setdefault(name, RunningScale()).update(value) for name, value in values.items()}

    def fired(self, z: Mapping[str, float]) -> str:
        """The statistic furthest above the threshold, empty if there is none."""
        over = {name: value for name, value in z.items() if value > self.threshold}
        return max(over, key=lambda name: over[name]) if over else ""

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {name: dataclasses.asdict(scale) for name, scale in self._scales.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._scales = {name: RunningScale(**values) for name, values in state.items()}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One measurement, as the alarm judges it. Changes in nats; positive is harm."""

    step: int
    harm: float
    """Loss of the first-seen rows over the lowest that they had."""
    harm_low: float
    """Lower end of its bootstrap interval over the rows."""
    rise: float
    """Its change since the measurement before."""
    interference: Mapping[str, float]
    """By matrix, since the measurement before; nan where not known."""

    @property
    def total(self) -> float:
        """Interference of all matrices together; nan where one is not known."""
        return math.fsum(self.interference.values())


class Alarm:
    """Up or down, since when, and which matrices it names."""

    def __init__(self, *, nats: float, patience: int) -> None:
        """nats: smallest harm worth an alarm. patience: calm measurements in a row that end it."""
        self.nats = nats
        self.patience = patience
        self.up = False
        self.since = 0
        self.calm = 0
        self.named: tuple[str, ...] = ()

    def consider(self, evidence: Evidence) -> Transition:
        """Judge one measurement.

        Raised: harm above `nats`, its interval above zero, and the loss still rising; the matrices named are those with
        interference above zero (none, where others did it). While it is up, matrices that do harm are added. A
        measurement is calm when the loss did not rise. Comparisons with nan (not measured) are False: no evidence
        raises nothing.
        """
        guilty = blame(evidence.interference)
        harmful = evidence.rise > 0
        if not self.up:
            if not (harmful and evidence.harm > self.nats and evidence.harm_low > 0):
                return "quiet"
            self.up, self.since, self.calm, self.named = True, evidence.step, 0, guilty
            return "raised"
        self.calm = 0 if harmful else self.calm + 1
        if self.calm >= self.patience:
            self.up, self.calm, self.named = False, 0, ()
            return "cleared"
        if harmful:
            self.named = tuple(dict.fromkeys((*self.named, *guilty)))
        return "kept"

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"up": self.up, "since": self.since, "calm": self.calm, "named": list(self.named)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.up, self.since, self.calm = state["up"], state["since"], state["calm"]
        self.named = tuple(state["named"])


def blame(nats: Mapping[str, float], share: float = BLAMED_SHARE) -> tuple[str, ...]:
    """The fewest matrices that hold `share` of all positive interference, the worst first."""
    harmful = sorted(((value, name) for name, value in nats.items() if value > 0), reverse=True)
    total, held, named = math.fsum(value for value, _ in harmful), 0.0, []
    for value, name in harmful:
        if held >= share * total:
            break
        named.append(name)
        held += value
    return tuple(named)
