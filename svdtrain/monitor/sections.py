"""The parts of the screen. Each is a list of lines that fit a width, at most `height` of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from svdtrain.monitor import plots
from svdtrain.monitor.findings import Approach, Situation
from svdtrain.monitor.forecast import MIN_POINTS
from svdtrain.monitor.session import Session, choose_metric, matches, metric_column, next_switches, parse_since
from svdtrain.monitor.state import ENDED, RunState

LEVEL_STYLES = {"CRITICAL": "bold red", "WARNING": "yellow", "INFO": "cyan"}
STATE_STYLES = {
    RunState.RUNNING: "bold green", RunState.FINISHED: "bold green", RunState.STARTING: "cyan",
    RunState.STOPPED: "yellow", RunState.PREEMPTED: "yellow", RunState.STALLED: "bold red",
    RunState.CRASHED: "bold red", RunState.UNKNOWN: "bold red",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Display:
    """What the user wants to see, and what the terminal can show."""

    metric: str = ""
    layers: str = ""
    since: str = ""
    ascii_only: bool = False
    colour: bool = True

    @property
    def dash(self) -> str:
        """A horizontal line."""
        return "-" if self.ascii_only else "─"

    @property
    def arrow(self) -> str:
        """From one mode to the next."""
        return "->" if self.ascii_only else "→"


def first_step(session: Session, display: Display) -> int:
    """First step to show."""
    return parse_since(display.since, session.view, session.clock())


def title(text: str, width: int, display: Display) -> Text:
    """A section's heading as a line across."""
    label = f"{display.dash} {text} "
    return Text(label + display.dash * max(0, width - len(label)), style="dim", no_wrap=True)


def fit(text: Text, width: int, display: Display) -> Text:
    """Cut to the width, with a mark where something is missing."""
    if text.cell_len > width:
        text.truncate(max(0, width - 1))
        text.append("~" if display.ascii_only else "…")
    text.no_wrap = True
    return text


def header(session: Session, width: int, display: Display) -> list[Text]:
    """State, step, ETA, restarts; then the newest numbers."""
    view, state = session.view, session.state
    total = f"/{view.num_iterations:,} ({100 * view.step / view.num_iterations:.1f} %)" if view.num_iterations else ""
    parts = [f"step {view.step:,}{total}"]
    if state not in ENDED:
        parts.append(f"ETA {_duration(view.eta_s)}")
        parts.append(f"{_duration(session.age_s)} ago")
    elif view.end is not None and view.end.get("run_seconds"):
        parts.append(f"in {_duration(view.end['run_seconds'])}")
    if view.num_resumes:
        parts.append(f"restarts {view.num_resumes}")
    first = Text(f"{session.path.name}  ", style="bold")
    first.append(state.value, style=STATE_STYLES[state])
    first.append("  " + "  ".join(parts), style="not bold")
    return [fit(first, width, display), fit(Text("  ".join(_numbers(session))), width, display)]


def _numbers(session: Session) -> list[str]:
    view = session.view
    layers = len(view.analyses.layers())
    values = [
        ("loss {:.4f}", view.series("train/loss_ema", "train/loss").last),
        ("bpb {:.4f}", view.series("val/bpb").last),
        (f"low-rank {{:.0f}}/{layers}", view.num_lowrank if layers else math.nan),
        ("{:,.0f} tok/s", view.series("train/tok_per_sec").last),
        ("MFU {:.1f} %", view.series("train/mfu").last),
        ("switches {}", sum(view.switch_counts.values()) if layers else math.nan),
        ("grad {:.3g}", view.series("train/grad_norm").last),
    ]
    return [form.format(value) for form, value in values if value == value]


def curve(session: Session, names: Sequence[str], label: str, width: int, height: int, display: Display) -> list[Text]:
    """A plot with its range at the left and its steps below; `height` lines in all."""
    series = session.view.series(*names)
    steps, values = series.points(first_step(session, display))
    axis_width = 7
    drawn = plots.curve(
        steps, values, width=width - axis_width - 1, height=max(1, height - 2), ascii_only=display.ascii_only
    )
    if drawn is None:
        return [title(f"{label}: no value yet", width, display), *[Text("")] * (height - 1)]
    bar = "|" if display.ascii_only else "│"
    lines = [title(f"{label} {values[-1]:.4f}", width, display)]
    for index, row in enumerate(drawn.rows):
        edge = drawn.high if index == 0 else drawn.low if index == len(drawn.rows) - 1 else None
        text = Text(f"{edge:{axis_width}.4g}"[:axis_width] if edge is not None else " " * axis_width, style="dim")
        text.append(bar, style="dim")
        lines.append(text.append(row, style="not dim cyan"))
    left, right = f"{drawn.first_step:,}", f"step {drawn.last_step:,}"
    gap = " " * max(1, width - axis_width - 1 - len(left) - len(right))
    return [*lines, Text(" " * (axis_width + 1) + left + gap + right, style="dim", no_wrap=True)]


def throughput(session: Session, width: int, display: Display) -> list[Text]:
    """One line: tokens per second over the shown steps."""
    series = session.view.series("train/tok_per_sec")
    _, values = series.points(first_step(session, display))
    if not values:
        return [Text("tok/s: no value yet", style="dim")]
    text = Text("tok/s ", style="dim")
    tail = f" {series.last:,.0f}"
    text.append(plots.sparkline(values, width=max(1, width - 6 - len(tail)), ascii_only=display.ascii_only), "green")
    return [fit(text.append(tail), width, display)]


def heat(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """Layer x time of the chosen metric."""
    key = ("heat", width, height, display, first_step(session, display))
    return session.view.memo(key, lambda: _heat(session, width, height, display))


def _heat(session: Session, width: int, height: int, display: Display) -> list[Text]:
    view = session.view
    metric = choose_metric(view, display.metric)
    since = first_step(session, display)
    snapshots = [s for s in view.analyses if s.step >= since]
    layers = [name for name in view.analyses.layers() if matches(name, display.layers)]
    if not snapshots or not layers:
        what = "no analysis yet" if not snapshots else f"no layer matches {display.layers!r}"
        return [title(f"layers: {what}", width, display)]
    rows = plots.group_layers(layers, max(1, height - 2))
    label_width = min(24, max(len(label) for label in rows))
    columns = [metric_column(view, s, metric) for s in snapshots]
    drawn = plots.heatmap([s.step for s in snapshots], columns, rows, width=width - label_width - 1)
    if drawn is None:
        return [title(f"{metric}: no value yet", width, display)]
    lines = [_heat_title(session, metric, drawn, width, display, grouped=len(rows) < len(layers))]
    for label, cells in zip(drawn.labels, drawn.cells, strict=True):
        line = Text(f"{label[-label_width:]:>{label_width}} ", style="dim", no_wrap=True)
        lines.append(line.append_text(_cells(cells, width - label_width - 1, display)))
    left, right = f"{snapshots[0].step:,}", f"step {snapshots[-1].step:,}"
    gap = " " * max(1, width - label_width - 1 - len(left) - len(right))
    return [*lines, Text(" " * (label_width + 1) + left + gap + right, style="dim", no_wrap=True)]


def _heat_title(
    session: Session, metric: str, drawn: plots.Heatmap, width: int, display: Display, *, grouped: bool
) -> Text:
    limit = next((limit.bound for limit in session.view.limits() if limit.metric == metric), None)
    text = Text(f"{display.dash} {metric} ", style="dim", no_wrap=True)
    text.append(f"{drawn.low:.3g} ")
    text.append_text(_cells([i / 7 for i in range(8)], 8, display))
    text.append(f" {drawn.high:.3g}")
    text.append(f", limit {limit:.3g}" if limit is not None else "")
    text.append(", highest of each block " if grouped else " ")
    return fit(text.append(display.dash * max(0, width - text.cell_len)), width, display)


def _cells(cells: Sequence[float], width: int, display: Display) -> Text:
    """Cells stretched to the whole width, in colour or as shades; equal neighbours as one piece, which draws faster."""
    marks = [_mark(cells[x * len(cells) // width], display) for x in range(width)]
    text = Text(style="not dim", no_wrap=True)
    for (mark, style), run in itertools.groupby(marks):
        text.append(mark * len(list(run)), style=style)
    return text


def _mark(value: float, display: Display) -> tuple[str, str]:
    """Character and style of one cell."""
    if value != value:
        return " ", ""
    if display.colour:
        return "#" if display.ascii_only else "█", plots.HEAT_COLOURS[min(7, int(value * 8))]
    shades = plots.ASCII_SHADES if display.ascii_only else plots.SHADES
    return shades[min(len(shades) - 1, 1 + int(value * (len(shades) - 1)))], ""


def worst(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """The matrices nearest to a limit: mode, rank, value, forecast. Then those that no limit concerns any more."""
    return session.view.memo(("worst", width, height, display), lambda: _worst(session, width, height, display))


def _worst(session: Session, width: int, height: int, display: Display) -> list[Text]:
    view = session.view
    values = view.layer_values()
    approaches = sorted(
        Situation(view=view).approaches, key=lambda a: a.limit.distance(a.value) / abs(a.limit.bound or 1)
    )
    nearest: dict[str, Approach | None] = {}
    for approach in approaches:
        nearest.setdefault(approach.layer, approach)
    judged = next((limit.metric for limit in view.limits()), "")
    for layer in sorted(values, key=lambda name: -values[name].get(judged, -math.inf)):
        nearest.setdefault(layer, None)
    shown = {layer: a for layer, a in nearest.items() if matches(layer, display.layers)}
    if not shown or not judged:
        return [title("worst layers: nothing to compare with a limit yet", width, display)]
    lines = [title("worst layers: value, limit, steps to it (80 %)", width, display)]
    name_width = min(26, max(len(plots.short_name(name)) for name in shown))
    for layer, found in list(shown.items())[: height - 1]:
        line = Text(f"{plots.short_name(layer)[-name_width:]:<{name_width}} ", no_wrap=True)
        line.append("low " if values[layer].get("mode", 0) > 0.5 else "full")
        line.append(f" r={values[layer].get('r', math.nan):<5.0f}", style="dim")
        line.append_text(
            _approach_text(found) if found else Text(f"{judged} {values[layer].get(judged, math.nan):.3g}")
        )
        lines.append(fit(line, width, display))
    return lines


def _approach_text(approach: Approach) -> Text:
    limit = approach.limit
    beyond = limit.distance(approach.value) < 0 and limit.mode == 0
    text = Text(f"{limit.metric} ")
    text.append(f"{approach.value:.3g}", style="bold red" if beyond else "bold")
    text.append(f" {'>' if limit.above else '<'}{limit.bound:.3g}? ", style="dim")
    return text.append(_steps_of(approach))


def _steps_of(approach: Approach) -> str:
    forecast = approach.forecast
    if forecast is None:
        return "-"
    if forecast.steps == 0:
        return "now"
    latest = f"{forecast.latest:,.0f}" if math.isfinite(forecast.latest) else "never"
    return f"{forecast.steps:,.0f} ({forecast.earliest:,.0f}..{latest})"


def switches(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """Mode switches, newest first, with reasons; rank changes only counted."""
    since = first_step(session, display)
    everything = [
        s for s in session.view.switches if s["step"] >= since and matches(str(s.get("layer")), display.layers)
    ]
    shown = [s for s in everything if s.get("change") != "rank"]
    ranks = len(everything) - len(shown)
    lines = [title(f"switches: {len(shown)}, and {ranks} rank changes", width, display)]
    for switch in list(reversed(shown))[: height - 1]:
        target = "full" if switch.get("change") == "to_full" else f"low-rank r={switch.get('r_new')}"
        text = Text(f"{switch['step']:>6,} ", style="dim")
        text.append(f"{plots.short_name(str(switch.get('layer')))} {display.arrow} {target}", style="not dim magenta")
        lines.append(fit(text.append(f"  {switch.get('reason', '')}", style="not dim"), width, display))
    return lines


def forecast(session: Session, width: int, display: Display) -> list[Text]:
    """One line: the next switch that the trends foretell, if it comes before the end of the run."""
    view = session.view
    ahead = next_switches(session, 1)
    text = Text("next switch: ", style="dim")
    remaining = view.num_iterations - view.step if view.num_iterations else math.inf
    if session.state in ENDED:
        text.append("the run has ended")
    elif ahead and ahead[0]["steps"] <= remaining:
        first = ahead[0]
        latest = f"{first['latest']:,}" if first["latest"] is not None else "never"
        text.append(f"{plots.short_name(first['layer'])} {display.arrow} {first['to']}", style="not dim bold")
        told = f" in ~{first['steps']:,} steps (80 %: {first['earliest']:,}..{latest})"
        text.append(told, style="not dim")
    elif len(view.analyses.recent) < MIN_POINTS:
        text.append(f"needs {MIN_POINTS} analyses, has {len(view.analyses.recent)}")
    else:
        text.append("none in sight before the end of the run" if ahead else "no trend towards a limit")
    return [fit(text, width, display)]


def alerts(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """What is up, worst first, then what was recorded, newest first."""
    up = session.book.by_severity()
    lines = [title(f"alerts: {len(up)} up" if up else "alerts: none up", width, display)]
    for alert in up:
        text = Text(f"{alert.finding.level} {alert.rule} ", style=LEVEL_STYLES[alert.finding.level])
        lines.append(fit(text.append(alert.finding.message, style="not bold default"), width, display))
    for when, step, level, told in _told(session):
        text = Text(f"{when} step {step:,} ", style="dim")
        text.append(f"{level} ", style=LEVEL_STYLES.get(level, ""))
        lines.append(fit(text.append(told), width, display))
    return lines[:height]


def _told(session: Session) -> list[tuple[str, int, str, str]]:
    """Recorded alerts, newest first: clock time, step, level, text."""
    return [
        (
            time.strftime("%H:%M", time.localtime(alert.get("time", 0))),
            int(alert.get("step", 0)),
            str(alert.get("level")),
            f"{alert.get('rule')}: {alert.get('message')}",
        )
        for alert in reversed(session.view.alerts)
    ]


def _duration(seconds: float) -> str:
    """1d 02h, 1h 02m, 2m 03s or 3s; ? if unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d {hours_left:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
