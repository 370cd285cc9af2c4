"""Runs as the report sees them."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdtrain.monitor.reader import LogFollower, NoRun, read_config
from svdtrain.monitor.series import SVD_LINE_START
from svdtrain.monitor.view import RunView
from svdtrain.runlog import decode_record

MAX_EVENTS = 200_000


@dataclass
class RunData:
    """One run: what the monitor knows of it, with all its events, and what only a second look tells."""

    path: Path
    name: str
    view: RunView
    analysis_dt: list[float] = field(default_factory=list)
    """Seconds of the steps with an analysis."""
    other_dt: list[float] = field(default_factory=list)
    """Seconds of all other steps."""

    @property
    def config(self) -> dict[str, Any]:
        """As saved; empty if it was not."""
        return self.view.config

    @property
    def tokens_per_step(self) -> float:
        """Batch size in tokens, as far as the log or the configuration say."""
        given = self.view.start.get("total_batch_size") or (self.config.get("train") or {}).get("total_batch_size")
        return float(given or 1)

    @property
    def analysis_cost(self) -> float | None:
        """Share of the training time that analyses take: extra seconds of their steps, spread over all steps."""
        if len(self.analysis_dt) < 3 or len(self.other_dt) < 10:
            return None
        usual = statistics.median(self.other_dt)
        extra = max(0.0, statistics.median(self.analysis_dt) - usual)  # less than nothing is noise
        steps = len(self.analysis_dt) + len(self.other_dt)
        return extra * len(self.analysis_dt) / (steps * usual)

    def hours_at(self, steps: list[int]) -> list[float]:
        """Hours spent in training steps until each step (evaluations and waiting between restarts left out)."""
        known, seconds = self.view.series("train/dt").points()
        hours, total, last, index = [], 0.0, 0, 0
        for step in steps:
            while index < len(known) and known[index] <= step:
                total += seconds[index] * (known[index] - last)
                last = known[index]
                index += 1
            hours.append(total / 3600)
        return hours

    def alert_counts(self) -> Counter[str]:
        """Alerts by level."""
        return Counter(str(alert.get("level")) for alert in self.view.alerts)


def load_run(path: Path) -> RunData:
    """Read a run directory. Raises NoRun if there is nothing in it."""
    view = RunView(read_config(path), max_events=MAX_EVENTS)
    run = RunData(path=path, name=path.resolve().name, view=view)
    if not (path / "metrics.jsonl").exists():
        raise NoRun(f"{path}: no metrics.jsonl there")
    last_analysis = -1
    for line in LogFollower(path / "metrics.jsonl").new_lines():
        view.feed_line(line)
        if line.startswith(SVD_LINE_START):
            last_analysis = view.analyses.last_step
        elif line.startswith(b'{"kind": "train"'):
            _take_dt(run, decode_record(line.decode("utf-8", "replace")), last_analysis)
    if view.num_records == 0:
        raise NoRun(f"{path}: no record that this program can read")
    view.analyses.materialise()
    return run


def _take_dt(run: RunData, record: dict[str, Any] | None, last_analysis: int) -> None:
    seconds = record.get("train/dt") if record else None
    if record and isinstance(seconds, float):
        (run.analysis_dt if record["step"] == last_analysis else run.other_dt).append(seconds)


def distinct_names(runs: list[RunData]) -> None:
    """Runs of the same directory name get a number behind it."""
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
