"""Figures of the planned shift: forgetting against the learning-rate frontier, and how well anything saw it coming."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdtrain.runlog import Record, read_records

HARM_WINDOW = 10  # steps over which the truth is judged; the first ones of a shift
HARM_NATS = 0.02  # rise of the first-seen loss within them that counts as harm
LATE_NATS = 0.1  # rise from which a warning is too late
QUIET_FROM = 60  # earlier steps are start-up, not quiet training
Series = dict[int, float]


def newest(records: Sequence[Record], kind: str) -> dict[int, Record]:
    """Records of one kind by step; a step that was repeated counts once, as it was last."""
    return {r["step"]: r for r in records if r["kind"] == kind}


def arm_row(run: Path, onset: int) -> dict[str, Any]:
    """Losses at the end and before the shift, and what the alarm did."""
    records = list(read_records(run / "metrics.jsonl"))
    truth = {step: r for step, r in newest(records, "shift").items() if "shift/loss_a" in r}
    last, before = truth[max(truth)], truth[max(step for step in truth if step <= onset)]
    alarms = list(newest(records, "alarm").values())
    train = newest(records, "train")
    forgetting = newest(records, "forgetting")
    return {
        "loss_b": last["shift/loss_b"],
        "loss_a": last["shift/loss_a"],
        "loss_first_seen": last["shift/loss_first_seen"],
        "loss_a_before": before["shift/loss_a"],
        "loss_first_seen_before": before["shift/loss_first_seen"],
        "forgetting": last["shift/loss_a"] - before["shift/loss_a"],
        "alarms": [
            {key: r[key] for key in ("step", "transition", "trigger", "alarm/harm", "alarm/interference", "matrices")}
            for r in alarms
            if r["transition"] != "kept"
        ],
        "steps_under_alarm": sum(r.get("alarm/up", 0) > 0 for r in newest(records, "trigger").values()),
        "train_s": round(sum(r["train/dt"] for r in train.values()), 1),
        "measuring_s": round(sum(r["forgetting/seconds"] for r in forgetting.values()), 1),
        "switches": sum(r["kind"] == "switch" for r in records),
    }


def against_frontier(rows: list[dict[str, Any]]) -> None:
    """Add to each row the forgetting that plain training has at the learning rate with the same loss on B, by linear
    interpolation between the plain arms; None outside of them."""
    frontier = sorted((r["loss_b"], r["forgetting"]) for r in rows if r["arm"].startswith("plain"))
    for row in rows:
        at_equal_b = _interpolate(frontier, row["loss_b"])
        row["frontier_forgetting"] = at_equal_b
        row["against_frontier"] = row["forgetting"] / at_equal_b - 1 if at_equal_b else None


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return None


def detection(run: Path, onset: int) -> dict[str, Any]:
    """AUROC, lead time and false alarms of every statistic and of the alarm, in a run that only watches.

    Truth: a step is harmful when the loss on first-seen text rises by more than HARM_NATS in the HARM_WINDOW steps
    after it; quiet steps are those before the onset whose window does not reach over it. An AUROC is taken twice:
    against all harmful steps, and against the first steps of the shift, which is what sees harm coming.
    """
    records = list(read_records(run / "metrics.jsonl"))
    truth = _truth(records)
    steps = sorted(newest(records, "trigger"))
    quiet = [s for s in steps if QUIET_FROM <= s <= onset - HARM_WINDOW and not _harmful(truth, s)]
    harmful = [s for s in steps if s > onset and _harmful(truth, s)]
    lowest = min(value for step, value in truth.items() if step <= onset)
    late = next((s for s in steps if s > onset and truth.get(s, -math.inf) > lowest + LATE_NATS), None)
    raised = [r["step"] for r in newest(records, "alarm").values() if r["transition"] == "raised"]
    false_alarms = [s for s in raised if s in quiet]
    asked_for = [s for s in newest(records, "forgetting") if s in quiet and (s + 1) % _interval(run)]
    first = next((s for s in raised if s > onset), None)
    found: dict[str, Any] = {
        "quiet_steps": len(quiet),
        "harmful_steps": len(harmful),
        "late_step": late,
        "alarm": {
            "first": first,
            "lead": None if late is None or first is None else late - first,
            "false_per_1000": 1000 * len(false_alarms) / max(1, len(quiet)),
            "asked_per_1000": 1000 * len(asked_for) / max(1, len(quiet)),
        },
        "statistics": {},
    }
    for name, series in statistics(records).items():
        found["statistics"][name] = _judge(series, quiet, harmful, onset, late)
    return found


def statistics(records: Sequence[Record]) -> dict[str, Series]:
    """Every candidate, step by step; what is measured at intervals holds its value until it is measured again."""
    trigger, shift, train = newest(records, "trigger"), newest(records, "shift"), newest(records, "train")
    forgetting, svd = newest(records, "forgetting"), newest(records, "svd")
    steps = sorted(trigger)
    found = {f"{n}_z": _take(trigger, f"trigger/{n}_z") for n in ("loss", "grad_norm")}
    found["abs(turn_z)"] = {step: abs(z) for step, z in _take(trigger, "trigger/turn_z").items()}  # as the trigger does
    found["grad_norm"] = _take(train, "train/grad_norm")
    found["update_size"] = _take(shift, "shift/update_size")
    found["turn"] = _take(trigger, "trigger/turn")
    found["interference"] = _held(_take(forgetting, "interference/total"), steps)
    found["probe_rise"] = _held(_take(forgetting, "probe/rise"), steps)
    found["harm"] = _held(_take(forgetting, "probe/harm"), steps)
    found["alarm_up"] = _take(trigger, "alarm/up")
    found["functional_drift_lift"] = _held(_mean(forgetting, "/functional_drift_lift"), steps)
    found["update_lift"] = _held(_mean(svd, "/update_lift"), steps)
    found["gradient_lift"] = _held(_mean(svd, "/gradient_lift"), steps)
    return {name: series for name, series in found.items() if series}


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive lies above a negative, ties half (Mann and Whitney 1947); None without both."""
    if not positive or not negative:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def _judge(series: Series, quiet: list[int], harmful: list[int], onset: int, late: int | None) -> dict[str, Any]:
    """At the threshold that no quiet step passes, how long before it is too late does the statistic speak."""
    calm = [series[s] for s in quiet if s in series]
    threshold = max(calm, default=math.inf)
    first = next((s for s in sorted(series) if s > onset and series[s] > threshold), None)
    early = range(onset + 1, onset + 1 + HARM_WINDOW)
    return {
        "auroc": auroc([series[s] for s in harmful if s in series], calm),
        "auroc_first_steps": auroc([series[s] for s in early if s in series], calm),
        "first": first,
        "lead": None if late is None or first is None else late - first,
    }


def _interval(run: Path) -> int:
    """Steps between the measurements that no trigger asks for."""
    return int(json.loads((run / "config.json").read_text())["svd"]["svd_interference_every"])


def _truth(records: Sequence[Record]) -> Series:
    """Loss on first-seen rows at every step, linear between the steps at which it was evaluated."""
    known = _take(newest(records, "shift"), "shift/loss_first_seen")
    found: Series = {}
    for (s0, v0), (s1, v1) in itertools.pairwise(sorted(known.items())):
        found |= {s: v0 + (v1 - v0) * (s - s0) / (s1 - s0) for s in range(s0, s1 + 1)}
    return found


def _harmful(truth: Series, step: int) -> bool:
    later = truth.get(step + HARM_WINDOW)
    return step in truth and later is not None and later - truth[step] > HARM_NATS


def _take(records: Mapping[int, Record], key: str) -> Series:
    return {step: float(r[key]) for step, r in records.items() if key in r}


def _mean(records: Mapping[int, Record], ending: str) -> Series:
    found = {}
    for step, record in records.items():
        values = [v for key, v in record.items() if key.endswith(ending)]
        if values:
            found[step] = sum(values) / len(values)
    return found


def _held(series: Series, steps: Sequence[int]) -> Series:
    held, found = math.nan, {}
    for step in steps:
        held = series.get(step, held)
        if not math.isnan(held):
            found[step] = held
    return found


def table(rows: Sequence[dict[str, Any]], say: Callable[[str], None] = print) -> None:
    """The rows for people."""
    columns = ("loss B", "loss A", "forgot", "frontier", "against")
    say(f"{'order':<14}{'seed':>5} {'arm':<22}" + "".join(f"{name:>9}" for name in columns) + "  alarms")
    for r in rows:
        alarms = sum(a["transition"] == "raised" for a in r["alarms"])
        numbers = (r["loss_b"], r["loss_a"], r["forgetting"], r["frontier_forgetting"])
        shown = "".join(f"{'-':>9}" if n is None else f"{n:>9.3f}" for n in numbers)
        against = "-" if r["against_frontier"] is None else f"{100 * r['against_frontier']:+.1f}%"
        say(f"{r['order']:<14}{r['seed']:>5} {r['arm']:<22}{shown}{against:>9}  {alarms}")
    for r in rows:
        if "detection" in r:
            _detection_table(r, say)


def _detection_table(row: dict[str, Any], say: Callable[[str], None]) -> None:
    found = row["detection"]
    say(f"\n{row['order']}, seed {row['seed']}: {found['quiet_steps']} quiet steps, {found['harmful_steps']} harmful")
    alarm = found["alarm"]
    say(f"  alarm: lead {alarm['lead']} steps, {alarm['false_per_1000']:.1f} false alarms per 1,000 quiet steps")
    say(f"  {'AUROC':<24} {'first steps':>11} {'harmful':>8}")
    for name, judged in sorted(found["statistics"].items(), key=lambda item: -(item[1]["auroc_first_steps"] or 0)):
        areas = ["-" if judged[key] is None else f"{judged[key]:.2f}" for key in ("auroc_first_steps", "auroc")]
        say(f"  {name:<24} {areas[0]:>11} {areas[1]:>8}   lead at no false alarm {judged['lead']}")
