"""Single keys from a terminal, without waiting for Enter. Where that is not possible nothing is read."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator


class Keys:
    """Reads keys from standard input while it is in cbreak mode."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def wait(self, seconds: float) -> str:
        """The next key within this time, else an empty string. Escape sequences (arrows) give an empty string."""
        if self._descriptor is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return ""
        pressed = os.read(self._descriptor, 16).decode("ascii", "replace")
        if not pressed:  # the terminal is gone; without this the loop would spin
            self._descriptor = None
        return pressed[0] if len(pressed) == 1 else ""


@contextlib.contextmanager
def cbreak() -> Iterator[Keys]:
    """Keys of this terminal; its settings come back at the end, whatever happens."""
    try:
        import termios
        import tty
    except ImportError:  # not a Unix
        yield Keys(None)
        return
    if not sys.stdin.isatty():
        yield Keys(None)
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keys(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
