"""The live view: a full screen that follows the run, and the keys it listens to."""

from __future__ import annotations

import argparse
import dataclasses
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from svdtrain.monitor.keys import cbreak
from svdtrain.monitor.plots import block_of
from svdtrain.monitor.reader import NoRun
from svdtrain.monitor.render import HELP, screen, summary
from svdtrain.monitor.rules import RULES
from svdtrain.monitor.sections import Display
from svdtrain.monitor.session import Session, choose_metric, metric_names

IDLE_REDRAW_S = 5.0


def make_console(arguments: argparse.Namespace) -> Console:
    """The terminal as the flags want it; NO_COLOR is honoured by rich."""
    return Console(no_color=True if arguments.no_color else None, highlight=False)


def display_of(arguments: argparse.Namespace, console: Console) -> Display:
    """What to show, and with which characters."""
    encodable = (console.encoding or "").lower().replace("-", "").startswith("utf")
    return Display(
        metric=arguments.metric,
        layers=arguments.layers,
        since=arguments.since,
        ascii_only=arguments.ascii or not encodable,
        colour=not console.no_color and console.color_system is not None,
    )


def print_screen(session: Session, console: Console, arguments: argparse.Namespace) -> None:
    """The screen once, left on the terminal."""
    display = display_of(arguments, console)
    for line in screen(session, console.width, max(20, console.height - 1), display, note=""):
        console.print(line, no_wrap=True, crop=True)


def live(session: Session, arguments: argparse.Namespace) -> None:
    """Follow the run until q or Ctrl-C; the last state stays on the terminal."""
    console = make_console(arguments)
    display = display_of(arguments, console)
    session.poll()
    if session.view.num_records:
        choose_metric(session.view, display.metric)  # an unknown one is said before the screen is taken over
    try:
        with cbreak() as keys, Live(console=console, screen=True, auto_refresh=False) as view:
            _Loop(session, display, console, view).run(keys, arguments.interval)
    except KeyboardInterrupt:
        pass
    for line in summary(session, display):
        console.print(Text(line))


class _Loop:
    """Reads, draws where something changed, waits for a key."""

    def __init__(self, session: Session, display: Display, console: Console, view: Live) -> None:
        self.session, self.display, self.console, self.view = session, display, console, view
        self.note = HELP
        self.paused = False
        self.explaining = False
        self._drawn_at = 0.0
        self._size = (0, 0)

    def run(self, keys, interval: float) -> None:
        changed = True
        while True:
            size = (self.console.width, self.console.height)
            if changed or size != self._size or time.monotonic() - self._drawn_at > IDLE_REDRAW_S:
                self._draw(size)
            key = keys.wait(interval)
            if key in ("q", "Q"):
                return
            changed = self._press(key)
            if not self.paused:
                changed |= self.session.poll()
                self.session.view.analyses.materialise(4)

    def _press(self, key: str) -> bool:
        if key == "m":
            self._next_metric()
        elif key == "l":
            self._next_layers()
        elif key == " ":
            self.paused = not self.paused
            self.note = "paused; space goes on" if self.paused else HELP
        elif key == "e":
            self.explaining = not self.explaining
        else:
            return False
        return True

    def _next_metric(self) -> None:
        names = metric_names(self.session.view)
        if names:
            current = choose_metric(self.session.view, self.display.metric)
            following = names[(names.index(current) + 1) % len(names)] if current in names else names[0]
            self.display = dataclasses.replace(self.display, metric=following)

    def _next_layers(self) -> None:
        """All layers, then each block by itself."""
        blocks = list(dict.fromkeys(f"{block_of(name)}." for name in self.session.view.analyses.layers()))
        choices = ["", *blocks]
        here = choices.index(self.display.layers) if self.display.layers in choices else -1
        self.display = dataclasses.replace(self.display, layers=choices[(here + 1) % len(choices)])

    def _draw(self, size: tuple[int, int]) -> None:
        self._size, self._drawn_at = size, time.monotonic()
        try:
            lines = (
                self._explanations(*size) if self.explaining else screen(self.session, *size, self.display, self.note)
            )
        except NoRun as error:
            lines = [Text(str(error))]
        self.view.update(Group(*lines), refresh=True)

    def _explanations(self, width: int, height: int) -> list[Text]:
        up = [alert.rule for alert in self.session.book.by_severity()]
        text = "\n\n".join(RULES[name].explain() for name in up) or "no alert is up"
        return [*Text(text).wrap(self.console, width)[: height - 1], Text("e goes back", style="dim")]
