"""Which alerts are up, and when somebody is told: cool-down and auto-resolve around the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from svdtrain.monitor.findings import INFO, SEVERITY, Finding, Situation
from svdtrain.monitor.rules import evaluate

COOL_DOWN_S = 600.0
CLEAR_CHECKS = 2


@dataclass(frozen=True, kw_only=True)
class ActiveAlert:
    """An alert that is up."""

    rule: str
    finding: Finding
    since_step: int
    num_clear: int = 0
    """Checks in a row in which the rule did not hold; at CLEAR_CHECKS the alert is resolved."""


@dataclass(frozen=True, kw_only=True)
class AlertEvent:
    """Something worth telling: an alert came up, rose to a higher level, or is over."""

    rule: str
    level: str
    message: str
    resolved: bool = False


@dataclass(frozen=True)
class AlertBook:
    """Alerts that are up, and when each rule was last told. Immutable: `advance` makes the next one."""

    active: Mapping[str, ActiveAlert] = field(default_factory=dict)
    told_at: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """Highest level that is up."""
        levels = [alert.finding.level for alert in self.active.values()]
        return max(levels, key=SEVERITY.__getitem__, default=None)

    def by_severity(self) -> list[ActiveAlert]:
        """Worst first, then newest first."""
        return sorted(self.active.values(), key=lambda a: (-SEVERITY[a.finding.level], -a.since_step))


def check(book: AlertBook, situation: Situation, now: float) -> tuple[AlertBook, list[AlertEvent]]:
    """Evaluate all rules and take the result into the book."""
    return advance(book, evaluate(situation, book.active), step=situation.view.step, now=now)


def advance(
    book: AlertBook, findings: Mapping[str, Finding], *, step: int, now: float
) -> tuple[AlertBook, list[AlertEvent]]:
    """The next book and what to tell. `now` in seconds of any clock.

    A rule that comes up again within COOL_DOWN_S of its last telling is up, but not told again, unless its level rose.
    """
    active, told_at = dict(book.active), dict(book.told_at)
    events = []
    for rule, finding in findings.items():
        before = active.get(rule)
        since = before.since_step if before else step
        active[rule] = ActiveAlert(rule=rule, finding=finding, since_step=since)
        if before is not None and SEVERITY[finding.level] <= SEVERITY[before.finding.level]:
            continue
        risen = before is not None
        if risen or now - told_at.get(rule, -COOL_DOWN_S) >= COOL_DOWN_S:
            told_at[rule] = now
            events.append(AlertEvent(rule=rule, level=finding.level, message=finding.message))
    for rule in [rule for rule in active if rule not in findings]:
        alert = replace(active[rule], num_clear=active[rule].num_clear + 1)
        active[rule] = alert
        if alert.num_clear >= CLEAR_CHECKS:
            del active[rule]
            if alert.finding.level != INFO:  # the end of a mere information is no news
                message = f"resolved at step {step}, up since step {alert.since_step}"
                events.append(AlertEvent(rule=rule, level=INFO, message=message, resolved=True))
    return AlertBook(active, told_at), events
