"""Everything the monitor knows of a run, in bounded memory; built record by record, in training or from a log."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from svdtrain.monitor.limits import Limit, limits_of
from svdtrain.monitor.series import Analyses, Series, Snapshot
from svdtrain.runlog import Record, decode_record

SVD_LINE = re.compile(rb'\{"kind": "svd", "step": (\d+), "time": ([\d.eE+-]+), "restart": (\d+)')
MUST_BE_FINITE = {"train/loss", "train/grad_norm", "val/bpb"}
HEADER = {"kind", "step", "time", "restart"}
SCALAR_KINDS = ("train", "eval")
MAX_EVENTS = 400
MAX_MEMO = 16
T = TypeVar("T")
PROBE = ("probe/", "control/")
MAX_SERIES = 64  # names of scalar metrics; a log that invents new names without end must not fill the memory


class RunView:
    """State of one run. Feed it records (or raw lines) in the order of the log.

    A record of an older restart than the newest is passed over; a restart takes back what lies after its step. A
    record that repeats restart, kind and step is a duplicate.
    """

    def __init__(self, config: dict[str, Any] | None = None, *, max_events: int = MAX_EVENTS) -> None:
        self.config = config or {}
        self.step = 0
        self.restart = -1
        self.num_iterations = int((self.config.get("train") or {}).get("num_iterations", 0))
        self.start: Record = {}
        self.end: Record | None = None
        self.scalars: dict[str, Series] = {}
        self.times: deque[tuple[int, float]] = deque(maxlen=256)
        self.clock = Series(512)
        self.analyses = Analyses()
        self.switches: deque[Record] = deque(maxlen=max_events)
        self.switch_counts: Counter[str] = Counter()
        self.alerts: deque[Record] = deque(maxlen=max_events)
        self.restarts: list[tuple[int, int]] = []
        self.last_checkpoint: Record | None = None
        self.last_time = 0.0
        self.longest_gap = 0.0
        self.num_records = 0
        self.num_unreadable = 0
        self.num_late = 0
        self.bad_steps: deque[int] = deque(maxlen=64)
        self.full_ranks: dict[str, int] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._memo: dict[Hashable, Any] = {}

    # --- feeding ---

    def feed_line(self, line: bytes) -> None:
        """Take one raw line. Analyses (the long ones) are decoded only when somebody looks at them."""
        match = SVD_LINE.match(line)
        if match and line.endswith(b"}"):
            step, when, restart = int(match[1]), float(match[2]), int(match[3])
            if self._admit("svd", step, when, restart):
                self._take_analysis(Snapshot(step, line=line))
            return
        record = decode_record(line.decode("utf-8", "replace"))
        if record is None:
            self.num_unreadable += 1
        else:
            self.feed(record)

    def feed(self, record: Record) -> None:
        """Take one decoded record."""
        step, when, restart = _header(record)
        kind = str(record["kind"])
        if kind in ("start", "resume"):
            self._begin(record, step, max(restart, 0))
        if kind == "alert" and self._is_repeated_alert(record, step):
            return
        if not self._admit(kind, step, when, restart, str(record.get("layer", ""))):
            return
        if kind in SCALAR_KINDS:
            self._take_scalars(record, step)
        elif kind == "forgetting":  # the probe's losses; not the interference, which has a number a matrix
            self._take_scalars({name: v for name, v in record.items() if name.startswith(PROBE)}, step)
        elif kind == "svd":
            self._take_analysis(Snapshot(step, record=record))
        elif kind == "switch":
            self._take_switch(record)
        elif kind == "alert":
            self.alerts.append(record)
        elif kind == "checkpoint":
            self.last_checkpoint = record
        elif kind == "end":
            self.end = record

    def _begin(self, record: Record, step: int, restart: int) -> None:
        """A process starts: what an earlier one did after this step is undone."""
        if restart < self.restart:
            return
        self.start, self.end = record, None
        self.num_iterations = int(record.get("num_iterations", self.num_iterations) or 0)
        self.restarts.append((restart, step))
        del self.restarts[:-MAX_EVENTS]
        self._rewind(step)
        self.restart = restart
        self.times.clear()
        self.longest_gap = 0.0
        self.last_time = 0.0

    def _rewind(self, step: int) -> None:
        for series in (*self.scalars.values(), self.clock):
            series.truncate(step)
        self.analyses.truncate(step)
        self._memo.clear()
        for events in (self.switches, self.alerts):
            while events and events[-1].get("step", 0) > step:
                dropped = events.pop()
                if events is self.switches:
                    self.switch_counts[str(dropped.get("layer", "?"))] -= dropped.get("change") != "rank"
        while self.bad_steps and self.bad_steps[-1] > step:
            self.bad_steps.pop()
        self._seen = {key: min(last, step) for key, last in self._seen.items()}
        self.step = step

    def _admit(self, kind: str, step: int, when: float, restart: int, subject: str = "") -> bool:
        """Whether the record counts; keeps the clock."""
        self.num_records += 1
        if restart < 0:
            restart = max(self.restart, 0)  # an old schema, which does not number its processes
        if restart < self.restart:
            self.num_late += 1
            return False
        if restart > self.restart >= 0:
            self._rewind(max(0, step - 1))  # a process whose `resume` line was lost
        self.restart = restart
        if kind in (*SCALAR_KINDS, "forgetting", "svd", "switch", "checkpoint"):
            if step <= self._seen.get((kind, subject), -1):
                return False
            self._seen[kind, subject] = step
        self.step = max(self.step, step)
        self._tick(kind, step, when)
        return True

    def _is_repeated_alert(self, record: Record, step: int) -> bool:
        same_step = itertools.takewhile(lambda alert: alert.get("step") == step, reversed(self.alerts))
        return any(alert == record for alert in same_step)

    def _tick(self, kind: str, step: int, when: float) -> None:
        if when <= 0:
            return
        gap = when - self.last_time
        if self.last_time > 0 and 0 < gap < 24 * 3600:  # a day and more is a clock that was set, not a wait
            self.longest_gap = max(gap, 0.98 * self.longest_gap)
        self.last_time = when
        if kind == "train":
            self.times.append((step, when))
            self.clock.add(step, when)

    def _take_scalars(self, record: Record, step: int) -> None:
        scalars = self.scalars
        for name, value in record.items():
            series = scalars.get(name)
            if series is None:
                if name in HEADER or not _is_number(value) or len(scalars) >= MAX_SERIES:
                    continue
                series = scalars[name] = Series()
            elif not _is_number(value):
                continue
            if not series.add(step, value) and name in MUST_BE_FINITE:
                self.bad_steps.append(step)

    def _take_analysis(self, snapshot: Snapshot) -> None:
        self.analyses.add(snapshot)
        self._memo.clear()

    def _take_switch(self, record: Record) -> None:
        self.switches.append(record)
        layer, change = str(record.get("layer", "?")), record.get("change")
        self.switch_counts[layer] += change != "rank"
        full = record.get("r_old") if change == "to_lowrank" else record.get("r_new") if change == "to_full" else None
        if isinstance(full, int):
            self.full_ranks[layer] = full

    # --- looking ---

    def memo(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Something computed from the analyses, kept until the next one: a screen is drawn far more often."""
        if key not in self._memo:
            if len(self._memo) >= MAX_MEMO:
                self._memo.clear()
            self._memo[key] = compute()
        return self._memo[key]

    def series(self, *names: str) -> Series:
        """The first of these metrics that the run has, else an empty series."""
        return next((self.scalars[name] for name in names if name in self.scalars), Series())

    def limits(self) -> list[Limit]:
        """Limits of the metrics that this run records."""
        return limits_of(self.config, self.analyses.metric_names())

    def layer_values(self) -> dict[str, dict[str, float]]:
        """layer -> metric -> value at the newest analysis."""
        last = self.analyses.last
        values: dict[str, dict[str, float]] = {}
        if last is None:
            return values
        for metric in last.metrics:
            for layer in last.layers(metric):
                values.setdefault(layer, {})[metric] = last.get(metric, layer)
        return values

    @property
    def svd_interval(self) -> int:
        """Steps between two analyses: of the log itself, else as configured."""
        steps = [s.step for s in self.analyses.recent]
        gaps = [b - a for a, b in itertools.pairwise(steps) if b > a]
        if gaps:
            return round(statistics.median(gaps))
        return int((self.config.get("svd") or {}).get("svd_interval", 20))

    @property
    def seconds_per_step(self) -> float:
        """Of the recent past, evaluations and saves included, clock jumps left out; nan if unknown."""
        pairs = list(self.times)
        gaps = [(t1 - t0, s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(pairs) if t1 > t0 and s1 > s0]
        if not gaps:
            return self.series("train/dt").last
        typical = statistics.median(gap / steps for gap, steps in gaps)
        plausible = [(gap, steps) for gap, steps in gaps if gap / steps <= max(100 * typical, 60)]
        return sum(gap for gap, _ in plausible) / sum(steps for _, steps in plausible)

    @property
    def eta_s(self) -> float:
        """Seconds until the last step; nan if unknown."""
        if self.num_iterations <= 0:
            return math.nan
        return max(0, self.num_iterations - self.step) * self.seconds_per_step

    @property
    def num_lowrank(self) -> int:
        """Matrices in low-rank mode at the newest analysis."""
        last = self.analyses.last
        return sum(last.get("mode", layer) > 0.5 for layer in last.layers("mode")) if last else 0

    @property
    def num_resumes(self) -> int:
        """Restarts after the first process."""
        return max(0, self.restart)


def _is_number(value: object) -> bool:
    return value.__class__ is float or value.__class__ is int  # a bool is none


def _header(record: Record) -> tuple[int, float, int]:
    """step, time, restart; 0, 0 and -1 for what an old schema lacks or a damaged line made unusable."""
    step, when, restart = record.get("step"), record.get("time"), record.get("restart")
    return (
        int(step) if isinstance(step, (int, float)) and math.isfinite(step) else 0,
        float(when) if isinstance(when, (int, float)) and math.isfinite(when) else 0.0,
        int(restart) if isinstance(restart, int) else -1,
    )
