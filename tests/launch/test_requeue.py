"""submitit's local executor: preempted and requeued twice, then finished."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdtrain.launch.job import TrainJob
from svdtrain.launch.snapshot import take_snapshot
from tests.main_job import records, tiny_settings, write_corpus

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds submitit's tasks through /proc"),
]
NUM_STEPS = 16
# Stands for svdtrain where only the road of the signal matters, and starts in a moment: counts, saves at a signal.
COUNTER = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
saved = run / "checkpoints" / "latest"
saved.parent.mkdir(parents=True, exist_ok=True)
step = int(saved.read_text()[5:]) if saved.exists() else 0
def save(*_):
    saved.write_text(f"step_{step:06d}")
    sys.exit(85)
signal.signal(signal.SIGUSR2, save)
while step < 40:
    step += 1
    with open(run / "steps.txt", "a") as file:
        file.write(f"{step}\\n")
    time.sleep(0.25)
"""
SLOW_STEPS = """
import pathlib, time
from svdtrain.hooks.train_log import TrainLog
on_step_end, slow = TrainLog.on_step_end, pathlib.Path(__file__).with_name("slow")
TrainLog.on_step_end = lambda self, state: (time.sleep(slow.exists()), on_step_end(self, state))[1]
from svdtrain.cli"""


def submit(job: TrainJob, folder: Path, *, tasks: int = 1, timeout_s: float, signal_delay_s: int) -> Any:
    import submitit

    executor = submitit.LocalExecutor(folder, max_num_timeout=100)
    executor.update_parameters(timeout_min=timeout_s / 60, signal_delay_s=signal_delay_s, tasks_per_node=tasks)
    return executor.submit(job)


def results(submitted: Any, folder: Path) -> list[int]:
    try:
        return submitted.results()
    except Exception as error:
        logs = [path for path in sorted(folder.glob("*_log.*"))]
        raise AssertionError("\n".join(path.read_text()[-3000:] for path in logs)) from error


def test_submitits_own_timer_preempts_and_requeues(tmp_path: Path) -> None:
    run, entry = tmp_path / "run", tmp_path / "counter.py"
    entry.write_text(COUNTER)
    job = TrainJob(run=str(run), entry=str(entry), flags=())
    submitted = submit(job, tmp_path / "submitit", timeout_s=6, signal_delay_s=1)
    assert results(submitted, tmp_path / "submitit") == [0]
    history = json.loads((run / "restarts.json").read_text())  # step of the newest checkpoint at each start
    assert len(history) >= 3  # requeued twice at least
    assert history == sorted(set(history))
    steps = [int(line) for line in (run / "steps.txt").read_text().split()]
    assert steps == list(range(1, 41))


def tasks_of(submitted: Any) -> list[int]:
    """Process ids of submitit's tasks: the children of its controller."""
    controller = submitted.job_id.split("_")[0]
    return [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], submitted: Any, folder: Path, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*_log.*")))
        assert time.monotonic() < end, f"took too long\n{logs}"
        assert submitted.state == "RUNNING", logs
        time.sleep(0.2)


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_requeued_twice_and_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """USR2 to every task, as Slurm sends it, whenever two more steps are there; no gap and no step twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train = {"num_iterations": NUM_STEPS, "device_batch_size": 1}
    (tmp_path / "settings.json").write_text(json.dumps(tiny_settings(write_corpus(tmp_path / "text"), train=train)))
    run, folder = tmp_path / "run", tmp_path / "submitit"
    entry = take_snapshot(run, [])
    entry.write_text(entry.read_text().replace("\nfrom svdtrain.cli", SLOW_STEPS))
    slow = entry.with_name("slow")
    slow.touch()
    job = TrainJob(run=str(run), entry=str(entry), flags=("--config", str(tmp_path / "settings.json")))
    submitted = submit(job, folder, tasks=tasks, timeout_s=600, signal_delay_s=1)

    def steps() -> list[int]:
        return [r["step"] for r in records(run, "train")] if (run / "metrics.jsonl").exists() else []

    for starts in (1, 2):
        before = len(steps())
        wait_for(lambda before=before: len(steps()) >= before + 2, submitted, folder)
        for pid in tasks_of(submitted):
            os.kill(pid, signal.SIGUSR2)
        if starts == 2:
            slow.unlink()
        wait_for(lambda starts=starts: len(records(run, "resume")) == starts, submitted, folder)
    assert results(submitted, folder) == [0] * tasks
    assert steps() == list(range(1, NUM_STEPS + 1))
    assert [r["reason"] for r in records(run, "end")] == ["preempted by signal SIGUSR2"] * 2 + ["finished"]
