"""The no-progress guard: a job that is requeued again and again without a newer checkpoint must stop, and say so.

RUN/restarts.json     step of the newest durable checkpoint at each start of the job
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svdtrain.runlog import RunDirectory, atomic_write_text

MAX_RESTARTS_WITHOUT_PROGRESS = 3
NO_PROGRESS = 86
"""Exit code: do not requeue."""


def newest_step(run: Path) -> int:
    """Step of the newest durable checkpoint, -1 if there is none."""
    try:
        name = (run / "checkpoints" / "latest").read_text().strip()
        return int(name.removeprefix("step_"))
    except (OSError, ValueError):
        return -1


def may_start(run: Path, restart: int) -> bool:
    """Whether the job may start once more; `restart` is 0 for a start by hand, which begins the count anew.

    After three restarts that brought no newer checkpoint the answer is no, with a CRITICAL alert in the metrics.
    """
    history = _history(run) if restart else []
    history.append(newest_step(run))
    run.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run / "restarts.json", json.dumps(history) + "\n")
    allowed = MAX_RESTARTS_WITHOUT_PROGRESS + 1  # the first start and three restarts
    if len(history) <= allowed or len(set(history[-allowed - 1 :])) > 1:
        return True
    message = (
        f"{MAX_RESTARTS_WITHOUT_PROGRESS} restarts without a newer checkpoint than "
        f"{'the beginning' if history[-1] < 0 else f'step {history[-1]}'}; not started again. Save more often "
        "(--save-every), ask for more time, or look for the error in the output"
    )
    directory = RunDirectory(run)
    directory.open_metrics()
    directory.append("alert", max(history[-1], 0), {"level": "CRITICAL", "rule": "no_progress", "message": message})
    directory.close()
    print(f"CRITICAL no_progress: {message}", file=sys.stderr)
    return False


def _history(run: Path) -> list[int]:
    try:
        return [int(step) for step in json.loads((run / "restarts.json").read_text())]
    except (OSError, ValueError, TypeError):
        return []


if __name__ == "__main__":  # slurm/_env.sh: RUN RESTART
    sys.exit(0 if may_start(Path(sys.argv[1]), int(sys.argv[2])) else NO_PROGRESS)
