"""Is the run alive? Judged from its records and from how long ago its file grew."""

from __future__ import annotations

import math
from enum import Enum

from svdtrain.monitor.view import RunView

MIN_STALL_S = 60.0
FIRST_STEP_PATIENCE_S = 900.0  # compilation and tokenising come before the first record
STALE_FACTOR = 20.0
MIN_STALE_S = 3600.0


class RunState(str, Enum):
    """What a run is doing."""

    STARTING = "starting"
    RUNNING = "running"
    STALLED = "stalled"
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    STOPPED = "stopped"
    FINISHED = "finished"
    UNKNOWN = "unknown"


ENDED = {RunState.FINISHED, RunState.STOPPED, RunState.CRASHED, RunState.PREEMPTED}


def run_state(view: RunView, age_s: float) -> RunState:
    """State of a run whose file was last written `age_s` seconds ago."""
    if view.end is not None:
        return _ended(str(view.end.get("reason", "")))
    if view.num_records == 0:
        return RunState.UNKNOWN
    if age_s > stall_limit_s(view):
        return RunState.STALLED
    return RunState.RUNNING if view.times else RunState.STARTING


def stall_limit_s(view: RunView) -> float:
    """Silence after which a run counts as stalled: well beyond its longest pause so far (evaluation, checkpoint)."""
    if not view.times:
        return FIRST_STEP_PATIENCE_S
    seconds = view.seconds_per_step
    steps = 20 * seconds if math.isfinite(seconds) else 0.0
    return max(MIN_STALL_S, steps, 3 * view.longest_gap)


def is_stale(view: RunView, age_s: float) -> bool:
    """Whether the run has been silent for so long that its numbers say nothing about now."""
    return view.end is None and age_s > max(MIN_STALE_S, STALE_FACTOR * stall_limit_s(view))


def _ended(reason: str) -> RunState:
    reason = reason.lower()
    if "keyboardinterrupt" in reason:
        return RunState.STOPPED
    if reason.startswith(("exception", "non-finite")):
        return RunState.CRASHED
    if "preempt" in reason or "signal" in reason:
        return RunState.PREEMPTED
    return RunState.FINISHED if reason in ("finished", "") else RunState.STOPPED
