"""Bounded memories of a run that may be of any length: scalar series, and analyses of all layers over time."""

from __future__ import annotations

import math
import re
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from typing import ClassVar

from svdtrain.runlog import Record, decode_record

MAX_POINTS = 2048
MAX_SNAPSHOTS = 256
NUM_RECENT = 32
MAX_SCHEMAS = 16
SVD_LINE_START = b'{"kind": "svd"'  # how our own writer begins it


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
        self._sum, self._num = 0.0, 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> bool:
        """Append the value of a step later than all before; False if it is not finite."""
        self.last_step = step
        self.recent.append((step, value))
        if value - value != 0:  # nan or inf; cheaper than math.isfinite in a loop of a hundred thousand
            self.num_non_finite += 1
            return False
        self._sum += value
        self._num += 1
        if self._num >= self._stride:
            self.steps.append(step)
            self.values.append(self._sum / self._num)
            self._sum, self._num = 0.0, 0
            if len(self.steps) >= self.max_points:
                self._merge_pairs()
        return True

    def truncate(self, step: int) -> None:
        """Forget everything after `step`: a resume starts again from there."""
        keep = bisect_right(self.steps, step)
        del self.steps[keep:], self.values[keep:]
        self._sum, self._num = 0.0, 0
        self.last_step = min(self.last_step, step)
        self.recent = deque((pair for pair in self.recent if pair[0] <= step), maxlen=self.recent.maxlen)

    def points(self, since: int = 0) -> tuple[list[int], list[float]]:
        """Steps and values from `since` on, the newest value always among them."""
        first = bisect_left(self.steps, since)
        steps, values = list(self.steps[first:]), list(self.values[first:])
        if self._num and self.last_step >= since:
            steps.append(self.last_step)
            values.append(self._sum / self._num)
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


class Schema:
    """Where each layer's metrics lie among the values of an svd record; shared by all records with the same keys."""

    _known: ClassVar[dict[tuple[str, ...], Schema]] = {}

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = [key for key in keys if key.startswith("svd/") and key.count("/") >= 2]
        self.positions: dict[str, dict[str, int]] = {}
        for position, key in enumerate(self.keys):
            layer, _, metric = key[4:].rpartition("/")
            self.positions.setdefault(metric, {})[layer] = position

    @classmethod
    def of(cls, record: Record) -> Schema:
        """The schema of a record, made once for each set of keys."""
        keys = tuple(record)
        if keys not in cls._known:
            if len(cls._known) >= MAX_SCHEMAS:
                cls._known.clear()
            cls._known[keys] = cls(keys)
        return cls._known[keys]

    def values_of(self, record: Record) -> array[float]:
        """The record's numbers in this order; nan for what is none."""
        try:
            return array("d", [record[key] for key in self.keys])
        except TypeError:
            return array("d", [v if isinstance(v := record[key], (int, float)) else math.nan for key in self.keys])


class Snapshot:
    """All layers' metrics at one analysis. Kept as the line it came from until somebody reads it."""

    __slots__ = ("_line", "_schema", "_values", "step")

    def __init__(self, step: int, *, line: bytes = b"", record: Record | None = None) -> None:
        self.step = step
        self._line = line
        self._schema: Schema | None = None
        self._values = array("d")
        if record is not None:
            self._take(record)

    def _take(self, record: Record) -> Schema:
        self._schema = Schema.of(record)
        self._values = self._schema.values_of(record)
        self._line = b""
        return self._schema

    @property
    def is_materialised(self) -> bool:
        """Whether the line was decoded."""
        return self._schema is not None

    def materialise(self) -> Schema:
        """Decode the line, if that did not happen yet, and free it."""
        if self._schema is not None:
            return self._schema
        return self._take(decode_record(self._line.decode("utf-8", "replace")) or {})

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the record's order."""
        return list(self.materialise().positions)

    def layers(self, metric: str) -> list[str]:
        """Layers that have the metric."""
        return list(self.materialise().positions.get(metric, ()))

    def column(self, metric: str) -> dict[str, float]:
        """layer -> value of one metric, without decoding all the others."""
        if self._schema is not None:
            return {layer: self._values[p] for layer, p in self._schema.positions.get(metric, {}).items()}
        return column_of_line(self._line, metric)

    def get(self, metric: str, layer: str) -> float:
        """One value; nan where there is none."""
        position = self.materialise().positions.get(metric, {}).get(layer)
        return math.nan if position is None else self._values[position]


def column_of_line(line: bytes, metric: str) -> dict[str, float]:
    """layer -> value of one metric of an undecoded svd record."""
    name = re.escape(metric.encode())
    ends = [match.start() for match in re.finditer(b"/" + name + b'": ', line)]  # a literal: as fast as memory
    found = {}
    for end in ends:
        begin = line.rfind(b'"svd/', 0, end) + 5
        begin_value = end + len(metric) + 4
        stop = line.find(b",", begin_value)  # -1, before the closing brace, for the last value of the line
        found[line[begin:end].decode("utf-8", "replace")] = float(line[begin_value:stop].strip(b'"'))
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

    def materialise(self, at_most: int | None = None) -> None:
        """Decode what is kept, so that the lines (100 kB each in a large run) can be freed; some of them at a time."""
        waiting = [s for s in reversed(list(self)) if not s.is_materialised]
        for snapshot in waiting[:at_most]:
            snapshot.materialise()

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
            for metric in snapshot.metrics:
                names.update(dict.fromkeys(snapshot.layers(metric)))
        return list(names)

    def history(self, metric: str, layer: str) -> list[tuple[int, float]]:
        """(step, value) of one layer over the recent analyses; steps without a finite value are left out."""
        pairs = ((s.step, s.get(metric, layer)) for s in self.recent)
        return [(step, value) for step, value in pairs if math.isfinite(value)]
