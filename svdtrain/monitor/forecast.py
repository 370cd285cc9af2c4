"""When will a metric reach its limit? A straight line through the last analyses, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS = 5
MAX_POINTS = 24
Z_80 = 1.2816  # standard normal: 80 % of the mass between -z and z


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Least-squares line through (step, value)."""

    level: float
    """Value of the line at the newest step."""
    slope: float
    """Per step."""
    slope_se: float
    """Standard error of the slope."""
    noise: float
    """Standard deviation around the line."""
    step: int
    """The newest step."""

    @property
    def z(self) -> float:
        """Slope in standard errors."""
        return self.slope / self.slope_se if self.slope_se > 0 else math.copysign(math.inf, self.slope or 1.0)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Steps from the newest analysis until the limit is reached: expected, and the ends of an 80 % interval."""

    steps: float
    earliest: float
    latest: float
    """inf: the trend may as well never get there."""


def fit_trend(points: Sequence[tuple[int, float]]) -> Trend | None:
    """The line through the last points; None with fewer than five."""
    points = points[-MAX_POINTS:]
    n = len(points)
    if n < MIN_POINTS:
        return None
    mean_x = sum(x for x, _ in points) / n
    mean_y = sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    noise = math.sqrt(residual / (n - 2))
    last = points[-1][0]
    return Trend(
        level=mean_y + slope * (last - mean_x),
        slope=slope,
        slope_se=noise / math.sqrt(spread),
        noise=noise,
        step=last,
    )


def steps_until(trend: Trend, bound: float, *, above: bool = True) -> Forecast | None:
    """When the trend reaches `bound`; None if it does not move towards it. 0: it is there.

    The interval takes the slope at -/+ 1.28 standard errors and the level at -/+ 1.28 standard deviations of the noise
    around the line (a single analysis above the bound is enough to switch): about 80 % for a straight trend.
    """
    sign = 1.0 if above else -1.0
    gap = sign * (bound - trend.level)
    slope = sign * trend.slope
    if gap <= 0:
        return Forecast(steps=0, earliest=0, latest=0)
    if slope <= 0:
        return None
    fast, slow = slope + Z_80 * trend.slope_se, slope - Z_80 * trend.slope_se
    return Forecast(
        steps=gap / slope,
        earliest=max(0.0, gap - Z_80 * trend.noise) / fast,
        latest=(gap + Z_80 * trend.noise) / slow if slow > 0 else math.inf,
    )
