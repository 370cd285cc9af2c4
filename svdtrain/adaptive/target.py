"""One watched matrix: what it is, what is known of it, and the record of a change."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from svdtrain.adaptive.analysis import History
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.adaptive.policy import Measurement

STATE_VERSION = 1
ChangeKind = Literal["to_lowrank", "to_full", "rank"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One matrix changed its mode or its rank. In full mode the rank is that of the whole matrix, g."""

    name: str
    kind: ChangeKind
    r_old: int
    r_new: int
    reason: str
    step: int
    diagnostics: dict[str, Any]

    def __str__(self) -> str:
        """`h.0.attn.c_q -> low-rank r=196: gradient_clobbering_risk`."""
        mode = "full" if self.kind == "to_full" else f"low-rank r={self.r_new}"
        return f"{self.name} -> {mode}: {self.reason}"


@dataclass(kw_only=True, eq=False)
class Target:
    """One watched matrix and everything known of it."""

    name: str
    W: nn.Parameter
    r: int | None = None
    """Rank in force for the analysis, also while in full mode; None before the first analysis."""
    factors: FactoredWeight | None = None
    """Present in low-rank mode with trained factors."""
    guard: UpdateGuard | None = None
    """Present in low-rank mode of the kinds that guard W's own updates (core, activation)."""
    history: History | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    drift: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of B and A in the principal directions at the last recomputation of the split, where they were minor."""
    num_switches: int = 0
    analyses_in_mode: int = 0

    @property
    def lowrank(self) -> bool:
        """Whether the matrix is trained in part only."""
        return self.factors is not None or self.guard is not None

    @property
    def form(self) -> FactoredWeight | UpdateGuard | None:
        """What low-rank mode consists of; None in full mode."""
        return self.factors if self.factors is not None else self.guard

    @property
    def num_free_directions(self) -> int:
        """r in low-rank mode, g in full mode."""
        return min(self.W.shape) if self.form is None else self.form.r

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        factors = self.factors
        return {
            "shape": list(self.W.shape),
            "r": self.r,
            "factors": None
            if factors is None
            else {"W_p": factors.W_p, "B": factors.B.detach(), "A": factors.A.detach()},
            "guard": None if self.guard is None else self.guard.state_dict(),
            "history": None if self.history is None else self.history.state_dict(),
            "metrics": dict(self.metrics),
            "drift": dict(self.drift),
            "num_switches": self.num_switches,
            "analyses_in_mode": self.analyses_in_mode,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.r, self.metrics, self.drift = state["r"], dict(state["metrics"]), dict(state.get("drift", {}))
        self.num_switches, self.analyses_in_mode = state["num_switches"], state["analyses_in_mode"]
        factors, guard, past = state["factors"], state["guard"], state["history"]
        self.factors = None if factors is None else FactoredWeight.restored(self.W, **factors)
        self.guard = None if guard is None else UpdateGuard.from_state(self.W, guard)
        self.history = None if past is None else History.from_state(past, self.W.device)


@dataclass(frozen=True, eq=False)
class Decision:
    """What the policy decided for one matrix, and from what."""

    target: Target
    measured: Measurement
    use_lowrank: bool
    r: int
    diagnostics: dict[str, Any]

    @property
    def new_rank(self) -> int | None:
        """r in low-rank mode; None for full training."""
        return self.r if self.use_lowrank else None

    def recomputes(self, every: int) -> bool:
        """Whether the split of W is computed anew: on entering low-rank mode, with a new rank there, and else at every
        so many decisions."""
        stays = self.target.lowrank and self.r == self.target.r
        return self.use_lowrank and not (stays and self.target.analyses_in_mode % every)


def change_made(decision: Decision, was_lowrank: bool, r_old: int, step: int) -> Change | None:
    """What a decision that was carried out has changed of the mode and rank before it; None: neither."""
    r_new = decision.target.num_free_directions
    kind: ChangeKind = "to_lowrank" if decision.use_lowrank else "to_full"
    if was_lowrank == decision.use_lowrank:
        if r_old == r_new:
            return None
        kind = "rank"
    return Change(
        name=decision.target.name, kind=kind, r_old=r_old, r_new=r_new,
        reason=decision.diagnostics["reason"], step=step, diagnostics=decision.diagnostics,
    )  # fmt: skip


def totals(targets: Collection[Target]) -> dict[str, Any]:
    """Counts over all matrices; see `AdaptiveSVD.summary`."""
    lowrank = {t.name: t.form for t in targets if t.form is not None}
    return {
        "num_targets": len(targets),
        "num_lowrank": len(lowrank),
        "num_switches": sum(t.num_switches for t in targets),
        "ranks": {name: form.r for name, form in lowrank.items()},
        "num_trainable": sum(t.W.numel() if t.form is None else t.form.counts().trainable for t in targets),
        "num_parameters": sum(t.W.numel() for t in targets),
    }


def check_state(state: Mapping[str, Any], targets: Mapping[str, Target], protect: str) -> None:
    """Raise ValueError, with what to do, unless this saved state fits these targets and settings."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"SVD state has version {state.get('version')}, this program reads {STATE_VERSION}")
    if state["protect"] != protect:
        raise ValueError(
            f"SVD state was saved with svd_protect={state['protect']}, here it is {protect}; "
            "resume with the same setting"
        )
    for name, values in state["targets"].items():
        factors = values["factors"]
        if factors is not None and name in targets and factors["B"].dtype != targets[name].W.dtype:
            raise ValueError(
                f"SVD state was saved with {name} in {factors['B'].dtype}, here it is {targets[name].W.dtype}; "
                "resume in the same type"
            )
    saved = {name: tuple(values["shape"]) for name, values in state["targets"].items()}
    own = {name: tuple(target.W.shape) for name, target in targets.items()}
    if saved != own:
        differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        raise ValueError(
            f"SVD state of another model or other svd_targets: {len(differing)} matrices differ, e.g. "
            f"{differing[0]}: saved {saved.get(differing[0])}, here {own.get(differing[0])}"
        )
