"""What an experiment is: a question, arms that are compared, and criteria that judge the rows they leave."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared. config: everything it is made of, plain JSON values.

    group: title of the table it stands in. exclusive: measures time, so it runs alone, after all others. weight: how
    long it takes, roughly and relative to others; the long ones start first.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    exclusive: bool = False
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What was asked, what came out of how many runs. reason: why it failed, if it did and the cause was found."""

    name: str
    target: str
    measured: str
    passed: bool
    runs: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of an experiment's tables: one number, or a few words, per row, None where a row has none.

    chance: the same for the best guess that does not look at the input.
    """

    title: str
    value: Callable[[Row], float | str | None]
    format: str = ".3f"  # of floats; ",.0f" for whole numbers
    chance: Callable[[Row], float | None] = lambda row: None


class Experiment:
    """A subclass fills in the class attributes and `arms`, `run` and `judge`.

    reasons: {criterion's name: why it failed}, shown only where it did fail. notes: what a reader of the tables should
    know, published numbers included. curve: the number in row["by_length"][length] that the figure shows.
    """

    name: ClassVar[str]
    proposal: ClassVar[str]
    question: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]] = ()
    reasons: ClassVar[dict[str, str]] = {}
    notes: ClassVar[tuple[str, ...]] = ()
    curve: ClassVar[str] = "final"
    curve_label: ClassVar[str] = "accuracy of the final answer"
    curve_is_log: ClassVar[bool] = False

    def arms(self) -> list[Arm]:
        """All arms, in the order of the tables; names are unique within the experiment."""
        raise NotImplementedError

    def settings(self, quick: bool) -> dict[str, Any]:
        """What all arms share (steps, lengths, ...), as plain JSON values. quick: a few seconds for all arms."""
        raise NotImplementedError

    def check(self, settings: dict[str, Any]) -> None:
        """Before any run: raises ValueError where something is missing that `run` will need."""

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        """What was measured, as plain JSON values; the runner adds seed, settings, hardware, time and command."""
        raise NotImplementedError

    def judge(self, rows: list[Row]) -> list[Criterion]:
        """The criteria, from the rows alone."""
        raise NotImplementedError

    def complete_settings(self, quick: bool) -> dict[str, Any]:
        """`settings`, and whether they are the quick ones."""
        return {**self.settings(quick), "quick": quick}

    def judged(self, rows: list[Row]) -> list[Criterion]:
        """`judge`, with the known reasons of what failed."""
        return [
            Criterion(**{**vars(c), "reason": c.reason or ("" if c.passed else self.reasons.get(c.name, ""))})
            for c in self.judge(rows)
        ]


def settings_hash(arm: Arm, settings: dict[str, Any]) -> str:
    """Twelve hex digits that change with anything an arm's result may depend on."""
    text = json.dumps({"config": arm.config, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# what judges read rows with ------------------------------------------------------------------------------------------


def rows_of(rows: Iterable[Row], arm: str) -> list[Row]:
    """An arm's rows, by seed."""
    return sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])


def values_of(rows: Iterable[Row], arm: str, value: Callable[[Row], float | None]) -> list[float]:
    """One number per row of an arm, without those that have none."""
    return [number for row in rows_of(rows, arm) if (number := value(row)) is not None]


def at_length(length: int, score: str = "final") -> Callable[[Row], float | None]:
    """Reads row["by_length"][length][score]."""
    return lambda row: row.get("by_length", {}).get(str(length), {}).get(score)


def spread(values: list[float], format: str = ".3f") -> str:
    """Median (smallest to largest), or a dash."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{format}}"
    return f"{statistics.median(values):{format}} ({min(values):{format}} to {max(values):{format}})"


def criterion(
    name: str,
    values: list[float],
    *,
    above: float | None = None,
    below: float | None = None,
    format: str = ".3f",
    runs: int | None = None,
) -> Criterion:
    """The median of `values` against a bound; without values it has failed. runs: behind them, if not one each."""
    assert (above is None) != (below is None), "a criterion has one bound"
    target = f"> {above:g}" if above is not None else f"< {below:g}"
    if not values:
        return Criterion(name=name, target=target, measured="no rows", passed=False, reason="not run")
    median = statistics.median(values)
    passed = median > above if above is not None else median < below  # type: ignore[operator]
    runs = len(values) if runs is None else runs
    return Criterion(name=name, target=target, measured=spread(values, format), passed=passed, runs=runs)
