"""One run under observation: reads what is new, judges it, and remembers what was told."""

from __future__ import annotations

import fnmatch
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from svdtrain.monitor.alerts import AlertBook, AlertEvent, check
from svdtrain.monitor.findings import CRITICAL, SEVERITY, Situation
from svdtrain.monitor.reader import LogFollower, NoRun, read_config
from svdtrain.monitor.series import Snapshot
from svdtrain.monitor.state import RunState, is_stale, run_state
from svdtrain.monitor.view import RunView
from svdtrain.runlog import Record

EXIT_OK, EXIT_WARNING, EXIT_CRITICAL, EXIT_UNKNOWN = 0, 1, 2, 3
R_OVER_G = "r/g"


class Source(Protocol):
    """Where lines come from: a growing file, or wandb."""

    generation: int
    gone: bool

    def new_lines(self) -> Iterable[bytes]: ...
    def age_s(self, now: float) -> float: ...


class Session:
    """What the monitor knows and has told of one run."""

    def __init__(self, path: Path, source: Source | None = None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.source: Source = source or LogFollower(path / "metrics.jsonl")
        self.clock = clock
        self.view = RunView(read_config(path))
        self.book = AlertBook()
        self.events: deque[tuple[int, AlertEvent]] = deque(maxlen=100)
        self.new_events: list[AlertEvent] = []
        self._generation = 0
        self._grew_at: float | None = None

    def poll(self) -> bool:
        """Read what is new and judge it; whether anything was new."""
        before = self.view.num_records + self.view.num_unreadable
        for line in self.source.new_lines():
            if self.source.generation != self._generation:
                before = self._forget()
            self.view.feed_line(line)
        grew = self.view.num_records + self.view.num_unreadable != before
        if grew and before:
            self._grew_at = time.monotonic()
        self._judge()
        return grew

    @property
    def age_s(self) -> float:
        """Seconds since the last record: the least of three witnesses, because any one clock may be wrong.

        They are the record's own time, the file's time of modification, and when this process saw the file grow.
        """
        now = self.clock()
        ages = [self.source.age_s(now)]
        if self.view.last_time > 0 and now >= self.view.last_time:
            ages.append(now - self.view.last_time)
        if self._grew_at is not None:
            ages.append(time.monotonic() - self._grew_at)
        return min(ages)

    @property
    def state(self) -> RunState:
        """What the run is doing."""
        return run_state(self.view, self.age_s)

    @property
    def exit_code(self) -> int:
        """0 ok, 1 warning, 2 critical, 3 unknown or stale."""
        if self.state is RunState.UNKNOWN or is_stale(self.view, self.age_s):
            return EXIT_UNKNOWN
        worst = self.book.worst
        return EXIT_OK if worst is None else SEVERITY[worst]

    def _forget(self) -> int:
        """Another file lies in the place: everything learned belongs to the old one."""
        self._generation = self.source.generation
        self.view = RunView(read_config(self.path))
        self.book = AlertBook()
        return 0

    def _judge(self) -> None:
        situation = Situation(view=self.view, age_s=self.age_s)
        self.book, events = check(self.book, situation, self.clock())
        self.new_events = events
        self.events.extend((self.view.step, event) for event in events)


# --- metrics by name ---


def metric_names(view: RunView) -> list[str]:
    """What --metric takes: everything the log has, and r/g where it has ranks."""
    names = view.analyses.metric_names()
    return [*names, R_OVER_G] if "r" in names else names


def choose_metric(view: RunView, wanted: str) -> str:
    """The metric that is meant: by name, by an unambiguous part of it, or by default the one that the policy judges.

    Raises NoRun if the run has no such metric.
    """
    names = metric_names(view)
    if not wanted:
        limits = view.limits()
        return limits[0].metric if limits else next(iter(names), "")
    matches = [wanted] if wanted in names else [name for name in names if wanted.replace("-", "_") in name]
    if not matches and names:
        raise NoRun(f"no metric {wanted!r}; this run has {', '.join(names)}")
    return matches[0] if matches else wanted


def metric_column(view: RunView, snapshot: Snapshot, metric: str) -> dict[str, float]:
    """layer -> value; r/g is the trained share of the directions."""
    if metric != R_OVER_G:
        return snapshot.column(metric)
    ranks = snapshot.column("r")
    model = view.config.get("model") or {}
    width = 64 * int(model.get("depth", 0)) or max((int(r) + 10 for r in ranks.values()), default=1)
    return {layer: r / view.full_ranks.get(layer, width) for layer, r in ranks.items()}


def matches(layer: str, pattern: str) -> bool:
    """Whether --layers (comma-separated parts of names, or shell patterns) chooses this layer."""
    if not pattern:
        return True
    parts = [part.strip() for part in pattern.split(",") if part.strip()]
    return any(part in layer or fnmatch.fnmatch(layer, part) for part in parts)


def parse_since(text: str, view: RunView, now: float) -> int:
    """First step to show: `500` is a step, `30m`, `2h` or `1d` a time ago. Raises ValueError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if not text:
        return 0
    if text.isdigit():
        return int(text)
    if text[-1] not in units or not text[:-1].replace(".", "", 1).isdigit():
        raise ValueError(f"--since takes a step (500) or a time ago (30m, 2h, 1d), got {text!r}")
    earliest = now - float(text[:-1]) * units[text[-1]]
    steps, times = view.clock.points()
    return next((step for step, when in zip(steps, times, strict=True) if when >= earliest), view.step)


# --- the same as data ---


def status_record(session: Session) -> Record:
    """Everything of --json."""
    view = session.view
    ahead = next_switches(session, 1)
    return {
        "run": str(session.path),
        "state": session.state.value,
        "exit_code": session.exit_code,
        "step": view.step,
        "num_iterations": view.num_iterations,
        "eta_s": _number(view.eta_s),
        "seconds_since_last_record": _number(session.age_s),
        "restarts": view.num_resumes,
        "train/loss": _number(view.series("train/loss_ema", "train/loss").last),
        "val/bpb": _number(view.series("val/bpb").last),
        "train/tok_per_sec": _number(view.series("train/tok_per_sec").last),
        "train/mfu": _number(view.series("train/mfu").last),
        "matrices": len(view.analyses.layers()),
        "lowrank": view.num_lowrank,
        "switches": sum(view.switch_counts.values()),
        "next_switch": ahead[0] if ahead else None,
        "alerts": [
            {
                "level": alert.finding.level,
                "rule": alert.rule,
                "message": alert.finding.message,
                "since_step": alert.since_step,
                "layers": list(alert.finding.layers),
            }
            for alert in session.book.by_severity()
        ],
    }


def next_switches(session: Session, num: int) -> list[Record]:
    """The nearest switches that the trends foretell: layer, where to, steps with an 80 % interval from now on."""
    view = session.view
    gone_by = view.step - view.analyses.last_step
    ahead = []
    for approach in Situation(view=view).approaches:
        forecast = approach.forecast
        if forecast is None or forecast.steps <= 0:
            continue
        ahead.append(
            {
                "layer": approach.layer,
                "to": approach.limit.leads_to,
                "metric": approach.limit.metric,
                "steps": round(max(0.0, forecast.steps - gone_by)),
                "earliest": round(max(0.0, forecast.earliest - gone_by)),
                "latest": round(forecast.latest - gone_by) if math.isfinite(forecast.latest) else None,
            }
        )
        if len(ahead) == num:
            break
    return ahead


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def is_bad_enough(session: Session, level: str) -> bool:
    """Whether an alert of this level or above is up."""
    worst = session.book.worst
    return worst is not None and SEVERITY[worst] >= SEVERITY.get(level.upper(), SEVERITY[CRITICAL])
