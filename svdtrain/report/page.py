"""The page: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import json
import math
import statistics
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from svdtrain.monitor.rules import RULES
from svdtrain.report.figures import Figure, comparison_figures, run_figures
from svdtrain.report.load import RunData
from svdtrain.report.style import CSS
from svdtrain.report.svg import draw, legend

MAX_ALERTS = 100
MAX_SWITCHES = 200
# No script runs and nothing is fetched, whatever a log may contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def all_figures(runs: Sequence[RunData]) -> list[tuple[str, str, list[Figure]]]:
    """(file name prefix, heading, figures) of every part of the page."""
    parts = [("all", "Progress" if len(runs) == 1 else "Runs compared", comparison_figures(list(runs)))]
    for index, run in enumerate(runs):
        parts.append((f"run{index}", run.name, run_figures(run)))
    return parts


def build_page(runs: Sequence[RunData]) -> str:
    """The whole document."""
    parts = all_figures(runs)
    names, made = ", ".join(run.name for run in runs), time.strftime("%Y-%m-%d %H:%M")
    body = [
        f"<h1>Training report: {escape(names)}</h1>",
        f'<p class="soft">Made {made} by svd-report. Every figure has its numbers as CSV.</p>',
        _summary(runs),
        _section(*parts[0]),
    ]
    if len(runs) > 1:
        body.append(_differences(runs))
    for run, part in zip(runs, parts[1:], strict=True):
        body += [_section(*part, lead=_lead(run)), _switch_table(run), _alert_table(run), _configuration(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>svdtrain: {escape(names)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(prefix: str, heading: str, figures: Sequence[Figure], lead: str = "") -> str:
    if not figures:
        return f"<h2>{escape(heading)}</h2>{lead}<p>No analyses or metrics to draw.</p>"
    drawn = "".join(_figure(figure, f"{prefix}-{figure.key}") for figure in figures)
    return f'<section><h2>{escape(heading)}</h2>{lead}<div class="grid">{drawn}</div></section>'


def _figure(figure: Figure, identity: str) -> str:
    data = base64.b64encode(figure.to_csv().encode()).decode()
    return (
        f'<figure id="{identity}"><a class="download" download="{identity}.csv" href="data:text/csv;base64,{data}" '
        f'aria-label="numbers of {escape(figure.title)} as CSV">CSV</a><h3>{escape(figure.title)}</h3>'
        f"{draw(figure, identity)}<figcaption>{legend(figure)}<p>{escape(figure.caption)}</p></figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, numeric: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, content: str) -> str:
        return f"<{tag}{' class=num' if index in numeric else ''}>{content}</{tag}>"

    header = "".join(cell("th", i, escape(name)) for i, name in enumerate(head))
    lines = ["".join(cell("td", i, content) for i, content in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><caption>{escape(caption)}</caption><tr>{header}</tr>{body}</table></div>'


def _summary(runs: Sequence[RunData]) -> str:
    head = [
        "run",
        "ended",
        "steps",
        "tokens",
        "hours",
        "last bpb",
        "best bpb",
        "last loss",
        "tok/s",
        "low-rank",
        "switches",
    ]
    head += ["analysis cost", "restarts", "alerts"]
    rows = []
    for run in runs:
        view = run.view
        _, bpb = view.series("val/bpb").points()
        _, speed = view.series("train/tok_per_sec").points()
        cost, alerts = run.analysis_cost, run.alert_counts()
        rows.append(
            [
                escape(run.name),
                escape(str(view.end.get("reason")) if view.end else "no"),
                f"{view.step:,}",
                f"{view.step * run.tokens_per_step:,.0f}",
                f"{run.hours_at([view.step])[0]:.2f}",
                f"{bpb[-1]:.4f}" if bpb else "-",
                f"{min(bpb):.4f}" if bpb else "-",
                _number(view.series("train/loss_ema", "train/loss").last),
                f"{statistics.median(speed):,.0f}" if speed else "-",
                f"{view.num_lowrank} of {len(view.analyses.layers())}",
                f"{sum(view.switch_counts.values()):,}",
                f"{100 * cost:.1f} %" if cost is not None else "-",
                str(view.num_resumes),
                ", ".join(f"{count} {level.lower()}" for level, count in alerts.most_common()) or "none",
            ]
        )
    return _table(head, rows, "Summary", numeric=range(2, 13))


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _lead(run: RunData) -> str:
    reasons: dict[str, int] = {}
    for switch in run.view.switches:
        if switch.get("change") != "rank":
            key = f"{switch.get('change')}: {switch.get('reason')}"
            reasons[key] = reasons.get(key, 0) + 1
    told = ", ".join(f"{escape(name)} ({count})" for name, count in sorted(reasons.items(), key=lambda item: -item[1]))
    return f'<p class="soft">Switches by reason: {told or "none"}.</p>'


def _switch_table(run: RunData) -> str:
    switches = [s for s in run.view.switches if s.get("change") != "rank"]
    if not switches:
        return ""
    rows = [
        [
            f"{s['step']:,}",
            escape(str(s.get("layer"))),
            escape(str(s.get("change"))),
            f"{s.get('r_old')} to {s.get('r_new')}",
            escape(str(s.get("reason"))),
        ]
        for s in switches[-MAX_SWITCHES:]
    ]
    table = _table(
        ["step", "matrix", "change", "r", "reason"], rows, f"The last {len(rows)} of {len(switches)}", numeric=[0]
    )
    return f"<details><summary>Switches ({len(switches)})</summary>{table}</details>"


def _alert_table(run: RunData) -> str:
    alerts = list(run.view.alerts)
    if not alerts:
        return '<p class="soft">No alert was recorded.</p>'
    rows = []
    for alert in list(reversed(alerts))[:MAX_ALERTS]:
        rule, level = str(alert.get("rule")), str(alert.get("level"))
        to_do = RULES[rule].to_do if rule in RULES else ""
        style = level if level in ("CRITICAL", "WARNING") else ""
        rows.append(
            [
                f"{alert.get('step', 0):,}",
                f'<span class="{style}">{escape(level)}</span>',
                escape(rule),
                escape(str(alert.get("message"))),
                escape(to_do),
            ]
        )
    table = _table(["step", "level", "rule", "message", "what to do"], rows, "Newest first", numeric=[0])
    return f"<details><summary>Alerts ({len(alerts)})</summary>{table}</details>"


def _configuration(run: RunData) -> str:
    text = escape(json.dumps(run.config, indent=2)) if run.config else "config.json is missing"
    return f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{text}</pre></details>"


def _differences(runs: Sequence[RunData]) -> str:
    """Settings that are not the same in all runs."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    differing = [key for key in keys if len({json.dumps(settings.get(key)) for settings in flat}) > 1]
    if not differing:
        return '<p class="soft">All runs have the same configuration.</p>'
    rows = [[escape(key), *(escape(str(settings.get(key, "-"))) for settings in flat)] for key in differing]
    return _table(["setting", *(run.name for run in runs)], rows, "Settings that differ")


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{group}.{name}": value
        for group, values in config.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
