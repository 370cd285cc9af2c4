"""How a run ends before its time: exit codes, signals before training starts, and the command that goes on. No torch.

Exit codes: PREEMPTED (85) means that everything is saved and the same command with --resume auto goes on; launchers
requeue on it and on nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

PREEMPTED = 85
INTERRUPTED = 130
RANK_LOST = 3
LAUNCHER_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


@contextlib.contextmanager
def nothing_to_save_yet() -> Iterator[None]:
    """Until training starts (data, model and checkpoint are being prepared) USR2 and TERM exit with PREEMPTED at once.

    Their default action would end the process with a code that launchers take for a crash.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _exit_preempted) for number in LAUNCHER_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_preempted(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    os.write(2, f"svdtrain: {name} before the first step; nothing is lost, start again\n".encode())
    os._exit(PREEMPTED)


def exit_code(ending: int) -> int:
    """Of a run that was ended by this signal after everything was saved. From here on more signals change nothing."""
    for number in (*LAUNCHER_SIGNALS, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not in the main thread: there are no handlers to mind
            signal.signal(number, signal.SIG_IGN)
    return INTERRUPTED if ending == signal.SIGINT else PREEMPTED


def resume_command(argv: Sequence[str], run_directory: Path) -> str:
    """The command line of this process, made to go on in its own run directory."""
    kept, skip = [], False
    for token in argv:
        if not skip and token.split("=", 1)[0] not in ("--run-dir", "--resume", "--run_dir"):
            kept.append(token)
        skip = not skip and token in ("--run-dir", "--resume", "--run_dir")
    return shlex.join(["svdtrain", *kept, "--run-dir", str(run_directory), "--resume", "auto"])


def leave_lost_rank(message: str) -> NoReturn:
    """Say it in one line and end without waiting for peers that will never answer."""
    print(f"svdtrain: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(RANK_LOST)
