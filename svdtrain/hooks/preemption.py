"""Signals end a run in order: finish the step, save, exit. A second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import Control, TrainState

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)  # not USR1: NCCL may catch it
SAME_EVENT_S = 1.0


class Preemption(Hook):
    """USR2 (the time limit under Slurm), TERM and Ctrl-C each set a flag; the loop agrees it over ranks and acts.

    The loop looks at step boundaries and between the batches of an evaluation. A second signal exits at once with
    128 + its number. Launchers pass one signal on by several roads (srun to the process group, torchrun to its
    workers), so what comes within SAME_EVENT_S of the first one is the same event. `close` brings the old handlers
    back.
    """

    name = "preemption"
    priority = Priority.CONTROL

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._control: Control | None = None
        self._first_at = 0.0

    def on_setup(self, state: TrainState) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python takes signals in the main thread only; whoever runs a trainer elsewhere owns them
        self._control = state.control
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def on_stop(self, state: TrainState) -> None:
        """All is saved: a launcher that now ends the slower ranks must not turn their exit code into another one."""
        if state.control.ending:
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._control is not None
        now = time.monotonic()
        if not self._control.signal:
            self._control.signal, self._first_at = number, now
        elif now - self._first_at >= SAME_EVENT_S:
            os._exit(128 + number)
