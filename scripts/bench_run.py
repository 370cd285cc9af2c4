"""Run `svdtrain` with the given flags and print one line of what it reached: time, speed, bits per byte, switches.

    python scripts/bench_run.py --label default -- --depth 4 --device cpu
    python scripts/bench_run.py --label reference -- --depth 4 --device cpu --num-iterations 2000 \\
        --max-seq-len 512 --device-batch-size 1 --total-batch-size 512 --svd-interval 20 --eval-every 500

The wall time includes the start of Python, tokenising if the cache is empty, evaluations and the sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from svdtrain.runlog import read_records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="run")
    parser.add_argument("--out", type=Path, default=None, help="append the result as one JSON line to this file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and the flags of svdtrain")
    arguments = parser.parse_args()
    flags = [flag for flag in arguments.flags if flag != "--"]
    if any(flag.split("=")[0] == "--run-dir" for flag in flags):
        parser.error("the run has a directory of its own, which goes with it: leave --run-dir out")
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        started = time.perf_counter()
        command = [sys.executable, "-m", "svdtrain.cli", "--run-dir", str(run), *flags]
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        seconds = time.perf_counter() - started
        if code:
            return code
        result = {"label": arguments.label, "wall_s": round(seconds, 1), **summarise(run)}
    print(json.dumps(result))
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps(result) + "\n")
    return 0


def summarise(run: Path) -> dict[str, Any]:
    """Figures of a finished run, from its records."""
    records = list(read_records(run / "metrics.jsonl"))
    train = [r for r in records if r["kind"] == "train"]
    bpb = [r["val/bpb"] for r in records if r["kind"] == "eval"]
    switches = [r for r in records if r["kind"] == "switch" and r["change"] != "rank"]
    return {
        "steps": train[-1]["step"],
        "first_bpb": round(bpb[0], 4),
        "last_bpb": round(bpb[-1], 4),
        "bpb_change": round(bpb[-1] / bpb[0] - 1, 4),
        "switches": len(switches),
        "first_switch": switches[0]["step"] if switches else None,
        "median_step_ms": round(1e3 * statistics.median(r["train/dt"] for r in train), 1),
        "train_s": round(sum(r["train/dt"] for r in train), 1),
        "sample": any(r["kind"] == "sample" and r["text"] for r in records),
    }


if __name__ == "__main__":
    sys.exit(main())
