"""Rules about the run as a whole: alive, finite, fast, going somewhere."""

from __future__ import annotations

import itertools
import math
import statistics

from svdtrain.monitor.findings import CRITICAL, INFO, SEVERITY, WARNING, Finding, Situation, duration
from svdtrain.monitor.state import RunState, is_stale, run_state
from svdtrain.monitor.view import RunView


def non_finite(now: Situation, active: bool) -> Finding | None:
    window = 50 if active else 20
    bad = sorted({step for step in now.view.bad_steps if step > now.view.step - window})
    bad += [a["step"] for a in now.view.alerts if a.get("rule") == "non_finite" and a["step"] > now.view.step - window]
    if not bad:
        return None
    return Finding(level=CRITICAL, message=f"loss or gradients not finite at step {max(bad)} ({len(set(bad))} lately)")


def stalled(now: Situation, active: bool) -> Finding | None:
    if run_state(now.view, now.age_s) is not RunState.STALLED:
        return None
    stale = " (stale: its numbers say nothing about now)" if is_stale(now.view, now.age_s) else ""
    return Finding(level=CRITICAL, message=f"no record for {duration(now.age_s)}, last at step {now.view.step}{stale}")


def crashed(now: Situation, active: bool) -> Finding | None:
    if run_state(now.view, now.age_s) is not RunState.CRASHED:
        return None
    assert now.view.end is not None
    return Finding(level=CRITICAL, message=f"ended at step {now.view.step}: {now.view.end.get('reason')}")


def no_progress(now: Situation, active: bool) -> Finding | None:
    starts = [step for _, step in now.view.restarts[-4:]]
    if len(starts) < 4 or len(set(starts)) > 1 or _saved_since(now.view, starts[-1]):
        return None
    return Finding(level=CRITICAL, message=f"three restarts from step {starts[-1]} without a newer checkpoint")


def _saved_since(view: RunView, step: int) -> bool:
    return view.last_checkpoint is not None and view.last_checkpoint["step"] > step


def throughput(now: Situation, active: bool) -> Finding | None:
    """Median of the last 20 steps against the typical step of this process."""
    values = [v for _, v in now.view.series("train/tok_per_sec").recent if math.isfinite(v)]
    values = values[-min(len(values), max(1, len(now.view.times))) :]  # of this process only
    if len(values) < 60:
        return None
    before, lately = statistics.median(values[:-20]), statistics.median(values[-20:])
    drop = 1 - lately / before if before > 0 else 0.0
    if drop < (0.1 if active else 0.2):
        return None
    return Finding(level=WARNING, message=f"{lately:,.0f} tok/s, {100 * drop:.0f} % below its usual {before:,.0f}")


def loss_shift(now: Situation, active: bool) -> Finding | None:
    """Mean of the last 10 losses against the median of the 50 before; the noise is that of the 100 before."""
    return _jump(now.view, "train/loss", "loss", 3.0 if active else 5.0)


def gradient_jump(now: Situation, active: bool) -> Finding | None:
    return _jump(now.view, "train/grad_norm", "gradient norm", 3.0 if active else 6.0)


def _jump(view: RunView, name: str, what: str, threshold: float) -> Finding | None:
    points = [(s, v) for s, v in view.series(name).recent if math.isfinite(v)][-110:]
    if len(points) < 60:
        return None
    before, lately = points[:-10], points[-10:]
    mean = statistics.fmean(v for _, v in lately)
    centre = statistics.median(v for _, v in before[-50:])
    values = [v for _, v in before]
    tens = [statistics.fmean(values[i : i + 10]) for i in range(0, len(values) - 9, 10)]
    # Gradient norms wander: means of ten differ by more than independent steps would make them.
    noise = max(_sigma(values) / math.sqrt(10), _sigma(tens)) or 1e-12
    z = (mean - centre) / (noise + 1e-3 * abs(centre))
    if z < threshold:
        return None
    return Finding(
        level=WARNING, message=f"{what} rose to {mean:.4g} from {centre:.4g} (z {z:.1f}); the data may have changed"
    )


def _sigma(values: list[float]) -> float:
    """Standard deviation from the differences of neighbours, so that a steady descent does not count as noise."""
    return 1.05 * statistics.median(abs(b - a) for a, b in itertools.pairwise(values))


def validation_rising(now: Situation, active: bool) -> Finding | None:
    _, values = now.view.series("val/bpb", "val/loss").points()
    if len(values) < 3:
        return None
    rise = values[-1] / min(values) - 1
    if rise < (0.005 if active else 0.02):
        return None
    return Finding(
        level=WARNING, message=f"validation {values[-1]:.4f} is {100 * rise:.1f} % above its best {min(values):.4f}"
    )


def checkpoint(now: Situation, active: bool) -> Finding | None:
    """Relays what the checkpoint code wrote, until a newer checkpoint is durable."""
    since = now.view.last_checkpoint["step"] if now.view.last_checkpoint else -1
    told = [a for a in now.view.alerts if "checkpoint" in str(a.get("rule")) and a["step"] >= max(since, 0)]
    told = [a for a in told if not str(a.get("message")).startswith("resolved")]
    if not told or (since >= 0 and now.view.step > since >= told[-1]["step"]):
        return None
    return Finding(level=_known_level(told[-1].get("level")), message=str(told[-1].get("message")))


def _known_level(level: object) -> str:
    return str(level) if level in SEVERITY else WARNING


def two_writers(now: Situation, active: bool) -> Finding | None:
    if now.view.num_late == 0:
        return None
    message = f"{now.view.num_late} records of an older process came after a restart: are two processes writing?"
    return Finding(level=WARNING, message=message)


def restarted(now: Situation, active: bool) -> Finding | None:
    if not now.view.num_resumes or not now.view.restarts or now.view.step - now.view.restarts[-1][1] > 50:
        return None
    return Finding(level=INFO, message=f"restart {now.view.num_resumes} went on from step {now.view.restarts[-1][1]}")


def unreadable(now: Situation, active: bool) -> Finding | None:
    if now.view.num_unreadable == 0:
        return None
    return Finding(level=INFO, message=f"{now.view.num_unreadable} lines of the log cannot be read and are left out")
