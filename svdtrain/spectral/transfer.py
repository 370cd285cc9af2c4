"""Numbers on their way from the device to the host, without anybody waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """Finished numbers of one step: values[name] is a flat dictionary of floats. kind: fast or slow."""

    kind: str
    step: int
    values: dict[str, dict[str, float]]


@dataclass
class _InFlight:
    step: int
    buffer: Tensor
    event: Any
    finish: Callable[[list[list[float]]], dict[str, dict[str, float]]]


class HostQueue:
    """One asynchronous copy a step into pinned memory; results come out in order, once their event has passed."""

    def __init__(self) -> None:
        self._flying: deque[_InFlight] = deque()
        self._done: deque[Report] = deque()
        self._free: dict[torch.Size, list[Tensor]] = {}

    def send(
        self, step: int, table: Tensor, finish: Callable[[list[list[float]]], dict[str, dict[str, float]]]
    ) -> None:
        """Queue a device table [rows, columns] of the fast lane; `finish` names its numbers on the host."""
        if not table.is_cuda:
            self._flying.append(_InFlight(step, table, None, finish))
            return
        free = self._free.setdefault(table.shape, [])
        buffer = free.pop() if free else torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        buffer.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(table.device))
        self._flying.append(_InFlight(step, buffer, event, finish))

    def put(self, report: Report) -> None:
        """Queue a report that is on the host already."""
        self._done.append(report)

    def poll(self) -> list[Report]:
        """Finished reports, oldest first. Never waits."""
        while self._flying and (self._flying[0].event is None or self._flying[0].event.query()):
            self._land(self._flying.popleft())
        reports = sorted(self._done, key=lambda report: report.step)
        self._done.clear()
        return reports

    def take(self, before: int) -> list[Report]:
        """The reports of steps before `before`, oldest first; waits for those that are on their way, and only those."""
        while self._flying and self._flying[0].step < before:
            flight = self._flying.popleft()
            if flight.event is not None:
                flight.event.synchronize()
            self._land(flight)
        ready = sorted((report for report in self._done if report.step < before), key=lambda report: report.step)
        self._done = deque(report for report in self._done if report.step >= before)
        return ready

    def flush(self) -> list[Report]:
        """All reports; waits for the copies that are on their way."""
        for flight in self._flying:
            if flight.event is not None:
                flight.event.synchronize()
        return self.poll()

    def _land(self, flight: _InFlight) -> None:
        rows = flight.buffer.tolist()
        if flight.event is not None:
            self._free[flight.buffer.shape].append(flight.buffer)
        self._done.append(Report("fast", flight.step, flight.finish(rows)))


def to_host(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of one type and device on the host, each with memory of its own; waits once, not once each."""
    if not vectors:
        return {}
    parts = torch.cat(list(vectors.values())).cpu().split([vector.numel() for vector in vectors.values()])
    return {name: part.clone() for name, part in zip(vectors, parts, strict=True)}
