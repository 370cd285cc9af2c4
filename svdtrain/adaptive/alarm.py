"""The alarm: cheap triggers at every step, confirmed by measured harm to first-seen data, with hysteresis. No tensors.

A trigger only asks for a measurement at once. The alarm goes up on evidence: the loss on first-seen text has risen by
more than can be noise. Interference names the watched matrices that made it rise. It goes down after several calm
measurements in a row. No share of a spectrum announces harm better than loss and gradient norm do (docs/METHOD.md), so
the shares (`lift`) are one trigger among others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

BLAMED_SHARE = 0.8  # matrices are named until they hold this share of all harm

Transition = Literal["raised", "kept", "cleared", "quiet"]


class RecentScale:
    """Mean and standard deviation of the last values of one statistic, and how far a new value lies from them.

    A window, because a running average with forgetting still holds the first steps, when a loss falls by whole nats,
    hundreds of steps later: its spread then hides a jump of the loss to several times its value. Values count at most
    three standard deviations away: an outlier cannot hide the next one, and a lasting change becomes the new normal in
    time.
    """

    def __init__(self, values: Iterable[float] = (), *, window: int = 50, warmup: int = 20) -> None:
        """values: what came before, the oldest first."""
        self.values = deque(values, maxlen=window)
        self.warmup = warmup

    def update(self, value: float) -> float:
        """z of `value` against what came before, nan while fewer than `warmup` values did; then take it in."""
        if not math.isfinite(value):
            return math.nan
        if len(self.values) < self.warmup:
            self.values.append(value)
            return math.nan
        mean = math.fsum(self.values) / len(self.values)
        deviation = math.sqrt(math.fsum((kept - mean) ** 2 for kept in self.values) / len(self.values))
        most = 3 * deviation if deviation > 0 else math.inf
        self.values.append(min(max(value, mean - most), mean + most))
        return (value - mean) / max(deviation, 1e-6 * abs(mean), 1e-12)


class Triggers:
    """One RecentScale per statistic. A statistic fires when its z passes the threshold; one whose fall says as much as
    its rise, when the size of z does."""

    def __init__(self, threshold: float, two_sided: Collection[str] = ()) -> None:
        self.threshold = threshold
        self.two_sided = frozenset(two_sided)
        self._scales: dict[str, RecentScale] = {}

    def update(self, values: Mapping[str, float]) -> dict[str, float]:
        """z of each statistic, nan where it is not known yet. Statistics may come and go."""
        return {name: self._scales.setdefault(name, RecentScale()).update(value) for name, value in values.items()}

    def fired(self, z: Mapping[str, float]) -> str:
        """The statistic furthest beyond the threshold, empty if there is none."""
        sizes = {name: abs(value) if name in self.two_sided else value for name, value in z.items()}
        over = {name: size for name, size in sizes.items() if size > self.threshold}
        return max(over, key=lambda name: over[name]) if over else ""

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {name: list(scale.values) for name, scale in self._scales.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._scales = {name: RecentScale(values) for name, values in state.items()}


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
