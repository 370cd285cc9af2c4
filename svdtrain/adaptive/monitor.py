"""Every-step monitoring: the tracking engine behind the controller, and its numbers at a fixed lag.

What the engine measures at step N is on its way from the device while step N + 1 is prepared. It is taken at step N + 1
and not before, however early it arrived, so decisions and records depend on step numbers alone: the same on every rank
and after every resume. By then the device is a whole step further, so nothing waits for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from svdtrain.adaptive.analysis import measure_tracked, starting_rank
from svdtrain.adaptive.policy import Measurement
from svdtrain.adaptive.target import Target
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import Decomposition
from svdtrain.spectral.null import wedin_bound
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from svdtrain.spectral.transfer import Report

_SLOW_EXTRAS = (
    "stable_rank", "entropy_rank", "participation_rank", "edge_rank", "threshold_rank", "intruders", "residual",
    "exact",
)  # fmt: skip
_SPECTRUM_AT = (0, 10, 25, 50, 90)
"""Singular values that are logged, by the share of all directions, in per cent, that lies before them."""
_FAST_EXTRAS = ("pp", "pm", "mp", "mm", "erasure", "right_lift")


class Monitor:
    """Feeds the tracker and remembers the newest numbers of every matrix."""

    def __init__(self, config: SVDConfig, targets: Mapping[str, Target], group: Any = None) -> None:
        """`group`: a process group to share the analyses over; every rank must then make the same calls."""
        self._config = config
        self._targets = targets
        settings = TrackerSettings(interval=config.svd_interval, offset=1)  # the freshest analysis is of step D - 1
        self.tracker = SubspaceTracker(self._weights(), self._cuts(), settings, group)
        self._fast: dict[str, dict[str, float]] = {}
        self._slow: dict[str, dict[str, float]] = {}
        self._spectra: dict[str, Tensor] = {}
        """Singular values (host) at the last decision."""
        self._analysed_at: dict[str, int] = {}
        """Step of the analysis that the last decision knew."""
        self._loaded: list[Report] = []
        self._newest: Report | None = None

    # --- every step ---

    def collect(self, step: int) -> None:
        """Take everything that was measured before `step`."""
        self._newest = None
        self.tracker.settle()
        reports = [*self._loaded, *self.tracker.take(before=step)]
        self._loaded = []
        for report in reports:
            known = self._fast if report.kind == "fast" else self._slow
            known.update({name: dict(values) for name, values in report.values.items()})
            if report.kind == "fast":
                self._newest = report

    def observe(self, step: int, *, with_gradients: bool = True) -> None:
        """Fast lane: enqueue the look at every gradient and every update."""
        gradients = {name: t.W.grad for name, t in self._targets.items() if t.W.grad is not None}
        self.tracker.observe(step, self._weights(), gradients if gradients and with_gradients else None)

    def analyse(self, step: int) -> None:
        """Slow lane: analyse the matrices whose turn it is."""
        self.tracker.analyse(step, self._weights(), self.tracker.due(step))

    def step_metrics(self) -> dict[str, float | str]:
        """The newly collected look at all matrices in a dozen numbers; empty where there was none."""
        if self._newest is None or not self._newest.values:
            return {}
        out: dict[str, float | str] = {"svd_step/of_step": float(self._newest.step)}
        for lane in ("update", "gradient"):
            out |= _summary(self._newest.values, lane)
        return out

    # --- at a decision ---

    def trouble(self, name: str) -> str | None:
        """Why there is nothing to decide from, in words; an empty string while nothing was measured yet."""
        fast = self._fast.get(name)
        if fast is None or not self._slow.get(name, {}).get("ok"):
            return "" if fast is None else "the analysis failed; the last basis stays in force"
        for lane, what in (("gradient", "gradient"), ("update", "weight")):
            if fast.get(f"{lane}/finite") == 0:
                return f"{what} is not finite; no analysis and no switch"
        return None

    def starting_rank(self, name: str) -> int:
        """Where r starts, from the tracked spectrum."""
        return starting_rank(self.tracker.host_spectrum(name), self._config.svd_min_rank)

    def measure(self, name: str, r: int) -> Measurement:
        """The numbers a decision is made from. Call once a decision: the spectrum becomes the one to compare with."""
        S, analysed_at = self.tracker.host_spectrum(name), self.tracker.analysed_at(name)
        # The same analysis twice is no evidence that the spectrum has settled.
        before = self._spectra.get(name) if analysed_at != self._analysed_at.get(name) else None
        self._spectra[name], self._analysed_at[name] = S, analysed_at
        m = self._targets[name].W.shape[0]
        return measure_tracked(self._fast[name], self._slow[name], S, before, m=m, r=r, r_min=self._config.svd_min_rank)

    def extras(self, name: str) -> dict[str, float]:
        """What else is known of a matrix, for the log."""
        fast, slow = self._fast.get(name, {}), self._slow.get(name, {})
        out = {key: slow[key] for key in _SLOW_EXTRAS if key in slow}
        out |= {f"update_{key}": fast[f"update/{key}"] for key in _FAST_EXTRAS if f"update/{key}" in fast}
        if name in self._spectra:
            S = self._spectra[name].numpy()
            out |= {f"singular_{at}": float(S[at * S.size // 100]) for at in _SPECTRUM_AT}
            out |= self._wedin(name, slow.get("update_ratio", math.nan))
        return out

    def _wedin(self, name: str, update_ratio: float) -> dict[str, float]:
        """Upper bound of the sine of the largest angle between the last two analyses, only where it is below 1. From
        the later spectrum and the update's Frobenius norm: Wedin's theorem does not care which spectrum is later."""
        S, r = self._spectra[name], self._targets[name].r
        if r is None or not 0 < S.numel() - r < S.numel() or math.isnan(update_ratio):
            return {}
        bound = wedin_bound(update_ratio * float(torch.linalg.vector_norm(S)), S, S.numel() - r)
        return {} if bound is None else {"wedin": bound}

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """New r of some matrices."""
        cuts = {name: min(self._targets[name].W.shape) - r for name, r in ranks.items()}
        if cuts:
            self.tracker.set_cuts(cuts)

    def install(self, decompositions: Mapping[str, Decomposition], step: int) -> None:
        """Exact decompositions were made anyway: track from there."""
        if decompositions:
            self.tracker.install(decompositions, {name: self._targets[name].W for name in decompositions}, step)

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        self._loaded += self.tracker.flush()
        return {
            "tracker": self.tracker.state_dict(),
            "fast": dict(self._fast),
            "slow": dict(self._slow),
            "spectra": dict(self._spectra),
            "analysed_at": dict(self._analysed_at),
            "pending": [{"kind": r.kind, "step": r.step, "values": r.values} for r in self._loaded],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.tracker.load_state_dict(state["tracker"])
        self._fast, self._slow = dict(state["fast"]), dict(state["slow"])
        self._spectra = {name: S.to("cpu", copy=True) for name, S in state["spectra"].items()}
        self._analysed_at = dict(state["analysed_at"])
        self._loaded = [Report(r["kind"], r["step"], r["values"]) for r in state["pending"]]

    def _weights(self) -> dict[str, Tensor]:
        return {name: target.W.detach() for name, target in self._targets.items()}

    def _cuts(self) -> dict[str, int]:
        """k of each matrix; before the first decision that of a matrix of full rank."""
        cuts = {}
        for name, target in self._targets.items():
            g = min(target.W.shape)
            r = (
                target.r
                if target.r is not None
                else starting_rank(torch.ones(g, device="cpu"), self._config.svd_min_rank)
            )
            cuts[name] = g - r
        return cuts


def _summary(values: Mapping[str, Mapping[str, float]], lane: str) -> dict[str, float | str]:
    """Median and largest lift and largest z over the matrices, who has them, and how many were not finite."""
    lifts = {name: row[f"{lane}/lift"] for name, row in values.items() if f"{lane}/lift" in row}
    broken = sum(row.get(f"{lane}/finite") == 0 for row in values.values())
    out: dict[str, float | str] = {}
    if broken:
        out[f"svd_step/{lane}_not_finite"] = float(broken)
    if lifts:
        worst = max(lifts, key=lambda name: lifts[name])
        zs = {name: values[name][f"{lane}/z"] for name in lifts}
        out[f"svd_step/{lane}_lift_median"] = statistics.median(lifts.values())
        out[f"svd_step/{lane}_lift_max"] = lifts[worst]
        out[f"svd_step/{lane}_z_max"] = max(zs.values())
        out[f"svd_step/{lane}_worst"] = worst
    return out
