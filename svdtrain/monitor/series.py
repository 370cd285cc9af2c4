"""Bounded memories of a run that may be of any length: scalar series, and analyses of all layers over time."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator

from svdtrain.runlog import Record, decode_record

MAX_POINTS = 2048
MAX_SNAPSHOTS = 256
NUM_RECENT = 64


class Series:
    """One metric over steps. Past `max_points`, neighbours are averaged pairwise, so the whole run stays visible.

    Values that are not finite are counted and passed over: they would make every mean non-finite.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.max_points = max_points
        self.steps = array("q")
        self.values = array("d")
        self.num_non_finite = 0
        self.last_step = -1
        self.recent: deque[tuple[int, float]] = deque(maxlen=512)
        self._stride = 1
        self._pending: list[float] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """Append the value of a step later than all before."""
        self.last_step = step
        self.recent.append((step, value))
        if not math.isfinite(value):
            self.num_non_finite += 1
            return
        self._pending.append(value)
        if len(self._pending) >= self._stride:
            self.steps.append(step)
            self.values.append(sum(self._pending) / len(self._pending))
            self._pending.clear()
            if len(self.steps) >= self.max_points:
                self._merge_pairs()

    def truncate(self, step: int) -> None:
        """Forget everything after `step`: a resume starts again from there."""
        keep = bisect_right(self.steps, step)
        del self.steps[keep:], self.values[keep:]
        self._pending.clear()
        self.last_step = min(self.last_step, step)
        self.recent = deque((pair for pair in self.recent if pair[0] <= step), maxlen=self.recent.maxlen)

    def points(self, since: int = 0) -> tuple[list[int], list[float]]:
        """Steps and values from `since` on, the newest value always among them."""
        first = bisect_left(self.steps, since)
        steps, values = list(self.steps[first:]), list(self.values[first:])
        if self._pending and self.recent and self.recent[-1][0] >= since:
            steps.append(self.last_step)
            values.append(self._pending[-1])
        return steps, values

    @property
    def last(self) -> float:
        """The newest value, finite or not; nan if there is none."""
        return self.recent[-1][1] if self.recent else math.nan

    def _merge_pairs(self) -> None:
        even = len(self.values) - len(self.values) % 2
        merged = [(self.values[i] + self.values[i + 1]) / 2 for i in range(0, even, 2)]
        self.steps = array("q", [self.steps[i] for i in range(1, even, 2)])
        self.values = array("d", merged)
        self._stride *= 2


class Snapshot:
    """All layers' metrics at one analysis. Kept as the line it came from until somebody reads it."""

    __slots__ = ("_line", "_metrics", "step")

    def __init__(
        self, step: int, line: bytes | None = None, metrics: dict[str, dict[str, float]] | None = None
    ) -> None:
        self.step = step
        self._line = line
        self._metrics = metrics

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """metric -> layer -> value, of whatever metrics the record has."""
        if self._metrics is None:
            assert self._line is not None
            record = decode_record(self._line.decode("utf-8", "replace"))
            self._metrics = by_metric(record or {})
            self._line = None
        return self._metrics


def by_metric(record: Record) -> dict[str, dict[str, float]]:
    """Numbers of an svd record as metric -> layer -> value."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith("svd/") and isinstance(value, (int, float)):
            layer, _, metric = key[4:].rpartition("/")
            if layer:
                found.setdefault(metric, {})[layer] = value
    return found


class Analyses:
    """Snapshots over the whole run, every `stride`-th of them, and the most recent ones all."""

    def __init__(self, max_snapshots: int = MAX_SNAPSHOTS, num_recent: int = NUM_RECENT) -> None:
        self.max_snapshots = max_snapshots
        self.kept: list[Snapshot] = []
        self.recent: deque[Snapshot] = deque(maxlen=num_recent)
        self.count = 0
        self._stride = 1

    def add(self, snapshot: Snapshot) -> None:
        """Append an analysis later than all before."""
        self.recent.append(snapshot)
        if self.count % self._stride == 0:
            self.kept.append(snapshot)
        self.count += 1
        if len(self.kept) >= self.max_snapshots:
            del self.kept[1::2]
            self._stride *= 2

    def truncate(self, step: int) -> None:
        """Forget everything after `step`."""
        self.kept = [s for s in self.kept if s.step <= step]
        self.recent = deque((s for s in self.recent if s.step <= step), maxlen=self.recent.maxlen)
        self.count = len(self.kept) * self._stride

    def materialise(self) -> None:
        """Decode what is kept, so that the lines (100 kB each in a large run) can be freed."""
        for snapshot in self:
            _ = snapshot.metrics

    def __iter__(self) -> Iterator[Snapshot]:
        """All snapshots in memory, oldest first."""
        first_recent = self.recent[0].step if self.recent else math.inf
        yield from (s for s in self.kept if s.step < first_recent)
        yield from self.recent

    @property
    def last(self) -> Snapshot | None:
        """The newest analysis."""
        return self.recent[-1] if self.recent else None

    @property
    def last_step(self) -> int:
        """Its step; -1 if there is none."""
        return self.recent[-1].step if self.recent else -1

    def metric_names(self) -> list[str]:
        """Every metric of the newest analyses, in the record's order."""
        names: dict[str, None] = {}
        for snapshot in list(self.recent)[-2:]:
            names.update(dict.fromkeys(snapshot.metrics))
        return list(names)

    def layers(self) -> list[str]:
        """Every layer of the newest analyses, in the record's order."""
        names: dict[str, None] = {}
        for snapshot in list(self.recent)[-2:]:
            for values in snapshot.metrics.values():
                names.update(dict.fromkeys(values))
        return list(names)

    def history(self, metric: str, layer: str) -> list[tuple[int, float]]:
        """(step, value) of one layer over the recent analyses; steps without a finite value are left out."""
        pairs = ((s.step, s.metrics.get(metric, {}).get(layer, math.nan)) for s in self.recent)
        return [(step, value) for step, value in pairs if math.isfinite(value)]
