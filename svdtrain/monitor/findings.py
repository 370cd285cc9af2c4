"""What the rules look at and what they answer; the matrices on their way to a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from svdtrain.monitor.forecast import MAX_POINTS, Forecast, fit_trend, steps_until
from svdtrain.monitor.limits import Limit
from svdtrain.monitor.view import RunView

CRITICAL, WARNING, INFO = "CRITICAL", "WARNING", "INFO"
SEVERITY = {INFO: 0, WARNING: 1, CRITICAL: 2}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the rules look at."""

    view: RunView
    age_s: float = 0.0
    """Seconds since the last record; 0 inside training."""

    @property
    def approaches(self) -> list[Approach]:
        """See the function of that name; computed once for an analysis."""
        return self.view.memo("approaches", lambda: approaches(self.view))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rule that holds."""

    level: str
    message: str
    layers: tuple[str, ...] = ()
    """The matrices concerned, worst first."""


@dataclass(frozen=True, kw_only=True)
class Approach:
    """A matrix on its way to a limit."""

    layer: str
    limit: Limit
    value: float
    forecast: Forecast | None
    z: float
    """Slope towards the limit in standard errors."""


def approaches(view: RunView) -> list[Approach]:
    """Every matrix with every limit that applies to its mode, nearest in time first, then nearest in value."""
    found = []
    limits = view.limits()
    for layer, values in view.layer_values().items():
        for limit in limits:
            value = values.get(limit.metric, math.nan)
            if not limit.applies(values) or not math.isfinite(value):
                continue
            trend = fit_trend(_history_in_mode(view, limit, layer))
            forecast = steps_until(trend, limit.bound, above=limit.above) if trend else None
            z = (trend.z if limit.above else -trend.z) if trend else 0.0
            found.append(Approach(layer=layer, limit=limit, value=value, forecast=forecast, z=z))
    return sorted(found, key=_nearness)


def _nearness(approach: Approach) -> tuple[float, float]:
    steps = approach.forecast.steps if approach.forecast else math.inf
    return steps, approach.limit.distance(approach.value) / abs(approach.limit.bound or 1.0)


def _history_in_mode(view: RunView, limit: Limit, layer: str) -> list[tuple[int, float]]:
    """The metric's recent values since the matrix last changed its mode: a trend does not reach across a switch."""
    points: list[tuple[int, float]] = []
    for snapshot in list(view.analyses.recent)[-MAX_POINTS:]:
        if (snapshot.get("mode", layer) > 0.5) != (limit.mode == 1):
            points.clear()
            continue
        value = snapshot.get(limit.metric, layer)
        if math.isfinite(value):
            points.append((snapshot.step, value))
    return points


def value_of(approach: Approach) -> str:
    """`update_lift 1.4, limit 1.5`."""
    return f"{approach.limit.metric} {approach.value:.3g}, limit {approach.limit.bound:.3g}"


def warming_up(view: RunView) -> bool:
    """Whether the policy does not decide yet."""
    return view.analyses.last_step < int((view.config.get("svd") or {}).get("svd_warmup", 10))


def names(layers: Sequence[str], num: int = 3) -> str:
    """The first few layers, and how many more."""
    shown = ", ".join(layers[:num])
    return f"{shown} and {len(layers) - num} more" if len(layers) > num else shown


def count(layers: Sequence[str]) -> str:
    """`1 matrix`, `3 matrices`."""
    return f"{len(layers)} matri{'x' if len(layers) == 1 else 'ces'}"


def duration(seconds: float) -> str:
    """`2h 03m` or `3m 04s`."""
    if not math.isfinite(seconds):
        return "ever"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
