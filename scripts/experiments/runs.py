"""What the experiment scripts share: run `svdtrain` several times at once, and read the figures off the records."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from svdtrain.runlog import Record, read_records

REFERENCE_SIZES = {
    "depth": 4,
    "max-seq-len": 512,
    "device-batch-size": 1,
    "total-batch-size": 512,
    "num-iterations": 2000,
    "svd-interval": 20,
    "eval-every": 200,
}
"""The sizes of the first runs of this method: 512 tokens a step, 2,000 steps."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run of an experiment."""

    name: str
    seed: int
    flags: dict[str, Any]

    def command(self, run: Path) -> list[str]:
        """The command line, also what the results page prints."""
        flags = {**self.flags, "seed": self.seed, "run-dir": run}
        return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def experiment_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The flags that every phase has: --data, --device, --parallel, --runs, --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=Path("docs/results") / f"{name}.json")
    return parser


class Places:
    """Room for some processes at once, spread over the GPUs that this one sees."""

    def __init__(self, parallel: int) -> None:
        gpus = _visible_gpus() or [""]
        self._free: SimpleQueue[str] = SimpleQueue()
        for i in range(parallel):
            self._free.put(gpus[i % len(gpus)])

    @contextlib.contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """Wait for a place; the environment of the process that goes there."""
        gpu = self._free.get()
        try:
            yield {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        finally:
            self._free.put(gpu)


def _visible_gpus() -> list[str]:
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(i) for i in range(torch.cuda.device_count())]
    return every if listed is None else [gpu for gpu in listed.split(",") if gpu]


def run_arms(arms: Sequence[Arm], directory: Path, *, parallel: int = 1) -> list[dict[str, Any]]:
    """Run every arm that has not finished yet; returns one row an arm. Raises RuntimeError if one fails."""
    directory.mkdir(parents=True, exist_ok=True)
    places = Places(parallel)
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda arm: run_arm(arm, directory, places), arms))


def run_arm(arm: Arm, directory: Path, places: Places) -> dict[str, Any]:
    """Run one arm, or read it where it finished before."""
    run = directory / f"{arm.name}-seed{arm.seed}"
    if not _finished(run):
        command = [sys.executable, "-m", "svdtrain.cli", *arm.command(run), "--resume", "auto"]
        with places.taken() as environment, open(directory / f"{run.name}.log", "w") as log:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise RuntimeError(f"{run.name} ended with exit code {code}; see {log.name}")
    return summarise(arm, run)


def _finished(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and any(r["kind"] == "end" and r["reason"] == "finished" for r in read_records(path))


def summarise(arm: Arm, run: Path) -> dict[str, Any]:
    """The figures of one run, ready for JSON."""
    records = list(read_records(run / "metrics.jsonl"))
    shown = {key: value for key, value in arm.flags.items() if key != "data"}
    return {
        "arm": arm.name,
        "seed": arm.seed,
        "flags": shown,
        "hardware": hardware(),
        "bpb": [[r["step"], r["val/bpb"]] for r in records if r["kind"] == "eval"],
        "switches": [
            {key: r[key] for key in ("step", "layer", "change", "r_old", "r_new", "reason", "diagnostics")}
            for r in records
            if r["kind"] == "switch"
        ],
        "alarms": [
            {"step": r["step"], "trigger": r["trigger"], "harm": r["alarm/harm"], "matrices": r["matrices"]}
            for r in records
            if r["kind"] == "alarm" and r["transition"] == "raised"
        ],
        "layers": layer_series(records),
        "samples": [{"prompt": r["prompt"], "text": r["text"]} for r in records if r["kind"] == "sample"][-2:],
        "train_s": round(sum(r["train/dt"] for r in records if r["kind"] == "train"), 1),
        "alerts": sum(r["kind"] == "alert" for r in records),
    }


SERIES = ("principal_alignment", "gradient_lift", "update_lift", "rotation_ratio", "r", "mode", "subspace_angle")


def layer_series(records: Sequence[Record]) -> dict[str, dict[str, list[list[float]]]]:
    """layer -> metric -> [[step, value], ...] of the analyses, rounded to five digits."""
    layers: dict[str, dict[str, list[list[float]]]] = {}
    for record in records:
        if record["kind"] != "svd":
            continue
        for key, value in record.items():
            parts = key.split("/")
            if len(parts) == 3 and parts[0] == "svd" and parts[2] in SERIES:
                series = layers.setdefault(parts[1], {}).setdefault(parts[2], [])
                series.append([record["step"], float(f"{value:.5g}")])
    return layers


def hardware() -> str:
    """What the runs ran on, in a few words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}"


def by_arm(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their arm, in order of first appearance."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def write_rows(rows: Sequence[dict[str, Any]], path: Path, command: str) -> None:
    """Rows and the command that made them, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "rows": list(rows)}) + "\n")
