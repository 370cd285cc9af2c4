"""From a session to a screen of a given size, to plain lines, to a summary."""

from __future__ import annotations

from rich.text import Text

from svdtrain.monitor import sections
from svdtrain.monitor.sections import Display
from svdtrain.monitor.session import Session

WIDE = 130
MIN_PLOT_HEIGHT = 5
HELP = "q quit   m metric   l layers   space pause   e explain alerts"


def screen(session: Session, width: int, height: int, display: Display, note: str = HELP) -> list[Text]:
    """Exactly at most `height` lines of at most `width` cells."""
    body_height = height - 3
    head = sections.header(session, width, display)
    body = (_wide if width >= WIDE else _narrow)(session, width, body_height, display)
    lines = [*head, *body[:body_height]]
    lines += [Text("")] * (height - 1 - len(lines))
    return [*lines, sections.fit(Text(note, style="dim"), width, display)]


def _narrow(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """One column: plots side by side, then heatmap, worst layers, switches, alerts. Plots take what is left over."""
    alerts = sections.alerts(session, width, max(2, height // 5), display)
    switches = sections.switches(session, width, max(2, height // 8), display)
    worst = sections.worst(session, width, max(3, height // 7), display)
    forecast = sections.forecast(session, width, display)
    speed = sections.throughput(session, width, display)
    rest = height - sum(len(part) for part in (alerts, switches, worst, forecast, speed))
    heat = sections.heat(session, width, max(3, rest - MIN_PLOT_HEIGHT), display)
    half = (width - 2) // 2
    curves = _side_by_side(_curves(session, half, max(MIN_PLOT_HEIGHT, rest - len(heat)), display), half)
    return [*curves, *speed, *heat, *worst, *forecast, *switches, *alerts]


def _wide(session: Session, width: int, height: int, display: Display) -> list[Text]:
    """Two columns: plots and heatmap at the left, tables at the right."""
    right_width = max(60, min(90, width * 2 // 5))
    left_width = width - right_width - 2
    speed = sections.throughput(session, left_width, display)
    heat = sections.heat(session, left_width, max(3, (height - len(speed)) // 2), display)
    plots_height = height - len(speed) - len(heat)
    loss, bpb = _curves(session, left_width, max(MIN_PLOT_HEIGHT, plots_height // 2), display)
    left = [*loss, *bpb, *speed, *heat]
    alerts = sections.alerts(session, right_width, max(4, height // 3), display)
    worst = sections.worst(session, right_width, max(4, height // 3), display)
    forecast = sections.forecast(session, right_width, display)
    rest = height - len(alerts) - len(worst) - len(forecast)
    right = [*alerts, *worst, *forecast, *sections.switches(session, right_width, max(2, rest), display)]
    return _side_by_side([left, right], left_width)


def _curves(session: Session, width: int, height: int, display: Display) -> list[list[Text]]:
    return [
        sections.curve(session, ("train/loss", "train/loss_ema"), "train loss", width, height, display),
        sections.curve(session, ("val/bpb", "val/loss"), "val bpb", width, height, display),
    ]


def _side_by_side(columns: list[list[Text]], left_width: int) -> list[Text]:
    """Two columns of lines, the left one padded, two blanks between."""
    left, right = columns
    lines = []
    for index in range(max(len(left), len(right))):
        line = Text(no_wrap=True)  # of its own: a style of the left text must not reach the right one
        line.append_text(left[index] if index < len(left) else Text(""))
        line.append(" " * max(0, left_width + 2 - line.cell_len))
        lines.append(line.append_text(right[index]) if index < len(right) else line)
    return lines


def plain(session: Session, display: Display, width: int = 100) -> list[str]:
    """The state in a few lines of text, for pipes and mails."""
    view = session.view
    parts = [
        *sections.header(session, 10_000, display),
        *sections.forecast(session, 10_000, display),
        *(sections.worst(session, width, 6, display)[1:] if view.analyses.count else []),
        *sections.alerts(session, 10_000, 8, display)[1:],
    ]
    return [part.plain.rstrip() for part in parts]


def event_line(session: Session) -> str:
    """One line of --follow."""
    first, second = sections.header(session, 10_000, Display())
    return f"{first.plain}  {second.plain}"


def summary(session: Session, display: Display) -> list[str]:
    """What remains on the terminal after the live view."""
    lines = plain(session, display)
    return [*lines, f"again: svd-monitor {session.path}    figures: svd-report {session.path}"]
