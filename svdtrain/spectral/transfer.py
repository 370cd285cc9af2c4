"""Numbers that have reached the host, until somebody takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """Finished numbers of one step: values[name] is a flat dictionary of floats. kind: fast or slow."""

    kind: str
    step: int
    values: dict[str, dict[str, float]]


class Reports:
    """Finished reports. `put` may be called from another thread than the rest."""

    def __init__(self) -> None:
        self._done: deque[Report] = deque()

    def put(self, report: Report) -> None:
        """Add one."""
        self._done.append(report)

    def take(self, before: float) -> list[Report]:
        """Those of steps before `before`, oldest first."""
        there = [self._done.popleft() for _ in range(len(self._done))]
        self._done.extend(report for report in there if report.step >= before)
        return sorted((report for report in there if report.step < before), key=lambda report: report.step)


def to_host(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of one type and device on the host, each with memory of its own; waits once, not once each."""
    if not vectors:
        return {}
    parts = torch.cat(list(vectors.values())).cpu().split([vector.numel() for vector in vectors.values()])
    return {name: part.clone() for name, part in zip(vectors, parts, strict=True)}
