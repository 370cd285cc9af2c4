"""What writing everything down costs: a real run with all sinks on, its log, wandb (offline) and the console.

    python scripts/bench_sinks.py --json sinks.json -- --depth 4 --device cpu --num-iterations 100

Every event of every sink is timed where it happens; `share` is the sum over the time of the training steps. wandb also
keeps a process of its own, whose CPU time stands beside it: on a machine with a core to spare it delays nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil
from rich.console import Console

from svdtrain.build import build_trainer
from svdtrain.cli import parse_arguments
from svdtrain.runlog import read_records
from svdtrain.trainer.hooks import Hook, Priority

EVENTS = [name for name in dir(Hook) if name.startswith("on_")]


class Stopwatch:
    """Seconds spent in the events of one hook."""

    def __init__(self, hook: Hook) -> None:
        self.seconds, self.calls = 0.0, 0
        for event in EVENTS:
            setattr(hook, event, self._timed(getattr(hook, event)))

    def _timed(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return handler(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.calls += 1

        return call


class Window(Hook):
    """Starts the watches after the first steps, in which everything is opened, and stops them at the last."""

    name = "window"
    priority = Priority.SINK

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.watches: dict[str, Stopwatch] = {}
        self.sinks: list[Hook] = []
        self.cpu: list[float] = []
        self.found: dict[str, float] = {}

    def on_step_end(self, state: Any) -> None:
        """Seconds so far at both ends."""
        if state.step in (self.skip, state.num_iterations):
            self.cpu.append(children_cpu())
            now = {name: watch.seconds for name, watch in self.watches.items()}
            self.found = {name: seconds - self.found.get(name, 0.0) for name, seconds in now.items()}


def children_cpu() -> float:
    """CPU seconds of the processes that this one has started."""
    found = psutil.Process().children(recursive=True)
    return sum(sum(child.cpu_times()[:2]) for child in found if child.is_running())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=int, default=20, help="steps before the measurement")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and the flags of svdtrain")
    arguments = parser.parse_args()
    flags = [flag for flag in arguments.flags if flag != "--"]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["WANDB_DIR"] = directory
        config = parse_arguments(["--wandb", "offline", *flags]).config
        window, path = Window(arguments.skip), Path(directory) / "run"
        trainer = build_trainer(config, path, Console(), extra_hooks=[window])
        sinks = [hook for hook in trainer.engine.hooks if hook.priority == Priority.SINK and hook is not window]
        window.watches = {hook.name: Stopwatch(hook) for hook in sinks}
        trainer.fit()
        records = list(read_records(path / "metrics.jsonl"))
    train = [r["train/dt"] for r in records if r["kind"] == "train" and r["step"] > arguments.skip]
    seconds = sum(train)
    result = {
        "flags": flags,
        "steps": len(train),
        "mean_step_ms": 1e3 * seconds / len(train),
        "records": len(records),
        "ms_per_step": {name: 1e3 * spent / len(train) for name, spent in window.found.items()},
        "share": sum(window.found.values()) / seconds,
        "other_processes_cpu_share": (window.cpu[1] - window.cpu[0]) / seconds,
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
