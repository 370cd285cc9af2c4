"""The numbers at which a matrix changes its mode, as far as the log and the configuration tell."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from svdtrain.config import CALIBRATED_PRESETS, SVD_PRESETS

SHARE_MARGIN = 0.05
RELATIVE_MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A metric and the value at which the mode changes."""

    metric: str
    bound: float
    margin: float
    """Distance to the bound from which on it counts as near."""
    mode: int
    """The mode in which it applies: 0 full, 1 low-rank."""
    above: bool = True
    """Whether the danger lies above the bound or below it."""
    requires: tuple[tuple[str, float, bool], ...] = ()
    """(metric, bound, above): what must also hold; a metric that was not measured holds nothing up."""

    def applies(self, values: dict[str, float]) -> bool:
        """Whether the limit concerns a matrix with these metrics: its mode, and what else is required."""
        if (values.get("mode", 0.0) > 0.5) != (self.mode == 1):
            return False
        measured = ((values.get(name, math.nan), bound, above) for name, bound, above in self.requires)
        return all(math.isnan(value) or (value > bound) == above for value, bound, above in measured)

    def distance(self, value: float) -> float:
        """How far the value is from the bound, on the quiet side; negative beyond it."""
        return self.bound - value if self.above else value - self.bound

    @property
    def leads_to(self) -> str:
        """Where the matrix goes."""
        return "low-rank" if self.mode == 0 else "full"


def limits_of(config: dict[str, Any], metrics: Collection[str]) -> list[Limit]:
    """Limits that apply to a run with this configuration and these metrics, the most important first."""
    svd = config.get("svd") or {}
    preset = svd.get("svd_preset", "fast")
    thresholds = SVD_PRESETS.get(preset, SVD_PRESETS["conservative"])
    calibrated = CALIBRATED_PRESETS.get(preset, CALIBRATED_PRESETS["conservative"])
    if svd.get("svd_rule") == "calibrated":
        lift, calm_lift, rotation = calibrated.lift, calibrated.calm_lift, calibrated.rotation
        directed, settled = ("update_z", calibrated.z, True), ("update_size", calibrated.established, False)
        found = [
            Limit(
                metric="update_lift", bound=lift, margin=RELATIVE_MARGIN * lift, mode=0, requires=(directed, settled)
            ),
            Limit(
                metric="rotation_ratio", bound=rotation, margin=RELATIVE_MARGIN * rotation, mode=0, requires=(settled,)
            ),
            Limit(metric="gradient_lift", bound=calm_lift, margin=RELATIVE_MARGIN * calm_lift, mode=1, above=False),
        ]
    else:
        danger, unsafe = thresholds.danger, thresholds.reconstruction
        calm = ("principal_alignment", danger, False)  # above it the matrix stays low-rank whatever else holds
        found = [
            Limit(metric="principal_alignment", bound=danger, margin=SHARE_MARGIN, mode=0),
            Limit(
                metric="reconstruction_error", bound=unsafe, margin=RELATIVE_MARGIN * unsafe, mode=1, requires=(calm,)
            ),
        ]
    return [limit for limit in found if limit.metric in metrics]
