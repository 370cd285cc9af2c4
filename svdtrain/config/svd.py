"""The settings of the method: what is watched, what decides, what low-rank mode protects, what an alarm does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svdtrain.config.setting import advanced, require, require_choices

SVDPreset = Literal["conservative", "fast", "off"]


@dataclass(frozen=True, kw_only=True)
class PolicyThresholds:
    """The numbers that the decision compares against. Shares are of ||G||_F^2, angles in radians."""

    danger: float
    """Principal share of the gradient above which training clobbers."""
    safe: float
    """Minor share of the gradient above which low-rank training loses nothing."""
    angle: float
    """Largest principal angle between two analyses below which the subspace counts as stable, radians."""
    reconstruction: float = 0.01
    """Relative Frobenius error below which the rank-r approximation is safe."""


SVD_PRESETS: dict[str, PolicyThresholds] = {
    "conservative": PolicyThresholds(danger=0.4, safe=0.6, angle=0.1),
    "fast": PolicyThresholds(danger=0.3, safe=0.5, angle=0.15),
}


@dataclass(frozen=True, kw_only=True)
class CalibratedThresholds:
    """Numbers of the calibrated rule. Danger begins above `lift` (with `z`) or `rotation`, ends below `calm_lift`."""

    lift: float
    """Times chance from which an update or gradient counts as directed at the principal directions."""
    z: float
    """Standard deviations that the same share must lie above chance."""
    calm_lift: float
    """Times chance below which the danger is over: less than `lift`, so noise around one value switches nothing."""
    rotation: float
    """rho from which the principal subspace turns more than the size of the update explains. A rank-one update that
    does nothing else reaches m n / (k (m - k)), which is 4 for a square matrix cut in the middle."""
    established: float = 0.5
    """||dW|| / ||W|| between two analyses above which there is nothing to clobber yet: W, often zero at first, still
    consists of its last updates, which then look aligned with it."""

    def __post_init__(self) -> None:
        if not self.calm_lift < self.lift:
            raise ValueError(f"calm_lift ({self.calm_lift}) must be below lift ({self.lift})")


# Chosen from 200 quiet steps of a depth-4 GPT under Muon, 16 matrices, 320 analyses: lift of the applied update 1.0 to
# 1.3 once established, rotation ratio .85 in the median, above 2 in about 2 % and above 3 in under 1 % of them.
CALIBRATED_PRESETS: dict[str, CalibratedThresholds] = {
    "conservative": CalibratedThresholds(lift=2.0, z=4.0, calm_lift=1.5, rotation=3.0),
    "fast": CalibratedThresholds(lift=1.5, z=3.0, calm_lift=1.25, rotation=2.0),
}

ALARM_ACTIONS = ("lowrank", "protect", "replay", "lr")


@dataclass(frozen=True, kw_only=True)
class SVDConfig:
    """The adaptive-SVD method. Also the third argument of `svdtrain.attach`."""

    svd_preset: SVDPreset = "fast"
    """Thresholds of the decision; off: no analysis, no switching."""
    svd_targets: str = "attn"
    """attn, mlp, all, or a regular expression searched in the parameter name."""
    svd_interval: int = 20
    """Steps between two full analyses."""
    svd_warmup: int = advanced(10)
    """Steps before the first decision."""
    svd_engine: Literal["tracked", "exact"] = advanced("tracked")
    """tracked: every step is watched and decisions are made from tracked bases, exact only where a matrix changes;
    exact: every matrix is decomposed at every interval and nothing is looked at in between (the slow reference)."""
    svd_monitor_every: int = advanced(1)
    """tracked: steps between two looks at the gradients and updates of all matrices."""
    svd_min_rank: int = advanced(8)
    """The rank r of the trained part never falls below this."""
    svd_adapter: Literal["auto", "reregister", "shadow"] = advanced("auto")
    """How B and A reach the optimizer; auto: reregister in our trainer, shadow in a foreign loop."""
    svd_moments: Literal["map", "reset"] = advanced("map")
    """Optimizer moments of B and A at a switch: mapped from W's by the chain rule, or zero."""
    svd_switching: bool = advanced(True)
    """False: watch only, never switch."""
    svd_rule: Literal["calibrated", "original"] = "calibrated"
    """What decides: evidence against chance (lift, z, rotation ratio), or the fixed shares of the original design."""
    svd_min_dwell: int = advanced(3)
    """Analyses that a matrix stays in a mode before the calibrated rule may change it again."""
    svd_recompute_every: int = advanced(2)
    """Decisions between two exact recomputations of the split of a matrix that stays low-rank at the same rank, which
    are the dearest part of the method; a new rank recomputes at once, and the original rule always does."""
    svd_protect: Literal["minor", "core", "middle", "principal", "random", "activation"] = "minor"
    """What low-rank mode trains (minor, middle, principal, random singular directions), or what it keeps updates out
    of: core (the principal-principal block), activation (the principal inputs of a reference set)."""
    svd_protect_share: float = advanced(0.25)
    """activation: share of the input directions that are protected."""
    svd_protect_strength: float = advanced(0.0)
    """activation: 0 protects them outright; above 0 shrinks updates softly, 4 is a good start."""
    svd_match_rms: bool = advanced(False)
    """Scale updates in low-rank mode to the norm that the full update would have had."""
    svd_on_alarm: str = "lowrank"
    """What an alarm does, comma-separated: lowrank, protect (their inputs), lr (lower it) act on the matrices that it
    names, replay mixes in first-seen text; none: only report."""
    svd_interference_every: int = advanced(20)
    """Steps between two measurements of forgetting and interference; 0: no measurements, no alarm."""
    svd_replay_share: float = advanced(0.02)
    """replay: share of the rows of a batch that is replaced by first-seen ones while an alarm is up; .01 to .05."""
    svd_alarm_lr: float = advanced(0.5)
    """lr: factor on the learning rate of the named matrices while an alarm is up."""
    svd_alarm_rank: float = advanced(0.25)
    """lowrank: rank of the named matrices, as a share of their smaller side."""
    svd_alarm_nats: float = advanced(0.05)
    """Rise of the loss on first-seen text, in nats a token, from which there is an alarm."""
    svd_alarm_z: float = advanced(4.0)
    """Standard deviations above normal from which a cheap statistic asks for a measurement at once."""
    svd_alarm_patience: int = advanced(3)
    """Calm measurements in a row that end an alarm."""
    svd_reference_rows: int = advanced(0)
    """Rows of first-seen text whose gradient is taken; 0: a sixteenth of the batch. Compiled, whole micro-batches."""
    svd_probe_rows: int = advanced(4)
    """Rows, at least, of the probe and of the control set; never fewer than reference rows."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.svd_interval >= 1, f"--svd-interval must be at least 1, got {self.svd_interval}")
        require(self.svd_monitor_every >= 1, f"--svd-monitor-every must be at least 1, got {self.svd_monitor_every}")
        require(self.svd_min_rank >= 1, f"--svd-min-rank must be at least 1, got {self.svd_min_rank}")
        require(self.svd_warmup >= 0, f"--svd-warmup must not be negative, got {self.svd_warmup}")
        require(self.svd_min_dwell >= 0, f"--svd-min-dwell must not be negative, got {self.svd_min_dwell}")
        require(self.svd_recompute_every >= 1, "--svd-recompute-every must be at least 1")
        require(
            0 < self.svd_protect_share < 1,
            f"--svd-protect-share must lie between 0 and 1, e.g. 0.25; got {self.svd_protect_share}",
        )
        require(
            self.svd_protect_strength >= 0,
            f"--svd-protect-strength must not be negative, got {self.svd_protect_strength}",
        )
        self._check_alarm()

    def _check_alarm(self) -> None:
        for name in ("svd_interference_every", "svd_reference_rows"):
            require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        for name in ("svd_replay_share", "svd_alarm_lr", "svd_alarm_rank"):
            value = getattr(self, name)
            require(0 < value < 1, f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")
        for name in ("svd_alarm_nats", "svd_alarm_z"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("svd_alarm_patience", "svd_probe_rows"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        actions = self.alarm_actions
        require(
            not ({"lowrank", "protect"} <= set(actions)),
            "--svd-on-alarm takes lowrank or protect, not both: a matrix is confined in one way at a time",
        )
        require(
            not ("lr" in actions and self.svd_adapter == "shadow"),
            "--svd-on-alarm lr needs --svd-adapter auto or reregister: shadow steps B and A out of its reach",
        )
        require(
            not ("lr" in actions and self.svd_match_rms),
            "--svd-on-alarm lr cannot work with --svd-match-rms, which sets the size of updates itself",
        )

    @property
    def alarm_actions(self) -> tuple[str, ...]:
        """What an alarm does, of lowrank, protect, replay and lr; () for none."""
        named = tuple(dict.fromkeys(part.strip() for part in self.svd_on_alarm.split(",")))
        if named == ("none",):
            return ()
        unknown = [part for part in named if part not in ALARM_ACTIONS]
        require(
            not unknown,
            f"--svd-on-alarm takes {', '.join(ALARM_ACTIONS)} (several with commas) or none, got {self.svd_on_alarm!r}",
        )
        return named

    @property
    def calibrated(self) -> CalibratedThresholds | None:
        """Numbers of the calibrated rule; None where the original one decides."""
        if self.svd_rule != "calibrated":
            return None
        return CALIBRATED_PRESETS.get(self.svd_preset, CALIBRATED_PRESETS["conservative"])

    @property
    def recompute_every(self) -> int:
        """`svd_recompute_every`; 1 under the original rule."""
        return 1 if self.calibrated is None else self.svd_recompute_every

    @property
    def thresholds(self) -> PolicyThresholds:
        """Thresholds of the chosen preset (those of `conservative` when the preset is off)."""
        return SVD_PRESETS.get(self.svd_preset, SVD_PRESETS["conservative"])
