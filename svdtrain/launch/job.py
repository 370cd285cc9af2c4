"""What submitit runs in every task: svdtrain's snapshot in a child process, and the requeue once everything is saved.

submitit's own signal handler calls `checkpoint` on rank 0 only, at any moment: a save that all ranks take part in would
wait there for ever (submitit#9). So the signal goes to the child, whose ranks agree on a step, save, and exit with 85;
only then is submitit's handler called, which requeues the job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdtrain.launch.environment import offline_unless_set, rank_environment
from svdtrain.launch.progress import NO_PROGRESS, may_start

PREEMPTED = 85
FORWARDED = (signal.SIGUSR2, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Picklable. `flags` are svdtrain's; `requeue`: on preemption, also after a failure, or never."""

    run: str
    entry: str
    flags: tuple[str, ...]
    requeue: str = "preempted"
    restart: int = 0

    def __call__(self) -> int:
        """Run this task's process to its end; returns 0. Raises RuntimeError with the exit code otherwise."""
        import submitit

        task = submitit.JobEnvironment()
        if task.global_rank == 0 and not may_start(Path(self.run), self.restart):
            raise RuntimeError(f"exit code {NO_PROGRESS}: no progress; see {self.run}/metrics.jsonl")
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        code = self._train(task)
        if code == 0:
            return 0
        wanted = {"preempted": code == PREEMPTED, "failed": True, "never": False}[self.requeue]
        if wanted and callable(requeue):
            requeue(signal.SIGUSR2, None)  # on rank 0 this requeues and does not return; on the others it does nothing
            return code
        raise RuntimeError(f"svdtrain ended with exit code {code}; its output says why")

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """submitit asks what to run after the requeue: the same, one restart later."""
        import submitit

        return submitit.helpers.DelayedSubmission(replace(self, restart=self.restart + 1))

    def _train(self, task: Any) -> int:
        job_number = zlib.crc32(str(task.job_id).encode())
        host = task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1"  # nodes that cannot resolve their own names
        environment = {
            **os.environ,
            **offline_unless_set(),
            **rank_environment(task.global_rank, task.num_tasks, task.local_rank, host, job_number),
        }
        command = [sys.executable, self.entry, *self.flags, "--run-dir", self.run, "--resume", "auto"]
        child = subprocess.Popen(command, env=environment)
        for number in FORWARDED:
            signal.signal(number, lambda received, frame: child.send_signal(received))
        return child.wait()
